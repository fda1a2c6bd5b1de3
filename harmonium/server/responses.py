"""/v1/responses: create, fetch, resume, cancel, delete, list the input, count and render.

Source: OpenAI's Responses API as its SDK calls it; docs/api.md lists every field and what differs.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from harmonium.errors import ApiError
from harmonium.harmony.render import render_prompt
from harmonium.harmony.vocabulary import vocabulary
from harmonium.server.body import ignored_headers, read_model, request_schema
from harmonium.server.errors import api_error, log_defect
from harmonium.server.responses_dialect import (
    DIALECT_HEADER,
    Dialect,
    encode_event,
    error_event,
    last_bytes,
    read_dialect,
)
from harmonium.server.responses_elsewhere import cancel_elsewhere, follow_elsewhere
from harmonium.server.responses_events import TERMINAL_TYPES
from harmonium.server.responses_input import PreparedResponse, prepare_response
from harmonium.server.responses_run import Responses
from harmonium.server.responses_schema import ResponsesRequest, without_effect
from harmonium.server.sse import encode_json, event_stream, unless_gone
from harmonium.server.state import state_of
from harmonium.server.store_records import RUNNING
from harmonium.server.store_threads import in_store_thread

router = APIRouter(prefix="/v1/responses")

MAX_PAGE = 100


def responses_of(request: Request) -> Responses:
    """The responses of the server that got this request."""
    found = request.app.state.responses
    assert isinstance(found, Responses)
    return found


def _owner(request: Request) -> str:
    """Who asks: a digest of the API key, "" on a server without keys. Only its owner sees a response."""
    return state_of(request).owner_of(request.headers)


@router.post("", response_class=Response, openapi_extra=dict(request_schema(ResponsesRequest)))
async def create_response(request: Request) -> Response:
    """Make a response: whole, streamed, or in the background."""
    body = await read_model(request, ResponsesRequest)
    dialect = read_dialect(request.headers.get(DIALECT_HEADER))
    prepared = await _prepare(request, body)
    responses = responses_of(request)
    headers = ignored_headers(body, without_effect(body))
    if body.background:
        run = await responses.start(prepared)
        if body.stream:
            return event_stream(request, _encoded(run.follow(-1), dialect), headers)
        return _json(run.created, headers)
    if body.stream:
        turn = await responses.open(prepared)
        return event_stream(request, _encoded(responses.stream(prepared, turn), dialect), headers)
    return _json(await unless_gone(request, responses.whole(prepared)), headers)


@router.post("/render", response_class=Response, openapi_extra=dict(request_schema(ResponsesRequest)))
async def render_response(request: Request) -> Response:
    """What the model would read for this request; nothing is generated or stored."""
    prepared = await _prepare(request, await read_model(request, ResponsesRequest))
    token_ids = await asyncio.to_thread(render_prompt, prepared.chat_request.conversation)
    text = vocabulary().decode(token_ids)
    return _json({"token_ids": token_ids, "text": text, "warnings": list(prepared.facts.warnings)})


@router.post("/input_tokens", response_class=Response, openapi_extra=dict(request_schema(ResponsesRequest)))
async def count_input_tokens(request: Request) -> Response:
    """How many tokens the prompt of this request has."""
    prepared = await _prepare(request, await read_model(request, ResponsesRequest))
    token_ids = await asyncio.to_thread(render_prompt, prepared.chat_request.conversation)
    return _json({"object": "response.input_tokens", "input_tokens": len(token_ids)})


@router.get("/{response_id}", response_class=Response)
async def get_response(
    request: Request, response_id: str, stream: bool = False, starting_after: int | None = None
) -> Response:
    """A stored response as it stands; with stream, its events after `starting_after`."""
    responses, owner = responses_of(request), _owner(request)
    run = responses.find_running(response_id, owner)
    if not stream:
        body = run.response if run is not None else await _stored_body(responses, response_id, owner)
        return _json(body)
    after = -1 if starting_after is None else starting_after
    dialect = read_dialect(request.headers.get(DIALECT_HEADER))
    if run is not None:
        return event_stream(request, _encoded(run.follow(after), dialect))
    body = await _stored_body(responses, response_id, owner)
    if responses.shared is not None and body["status"] in RUNNING:
        elsewhere = follow_elsewhere(responses.shared, response_id, owner, after)
        return event_stream(request, _encoded(elsewhere, dialect))
    events = await in_store_thread(responses.store.events, response_id, owner, after)
    if events is None:
        raise ApiError(
            f"response {response_id[:100]!r} has no stored stream; only those made with background do",
            param="stream",
            code="no_stored_stream",
        )
    return event_stream(request, _encoded(_listed(events), dialect))


@router.delete("/{response_id}", response_class=Response)
async def delete_response(request: Request, response_id: str) -> Response:
    """Forget a response; one that runs is cancelled first."""
    responses, owner = responses_of(request), _owner(request)
    run = responses.find_running(response_id, owner)
    if run is not None:
        await responses.cancel(run)
    if not await in_store_thread(responses.store.delete, response_id, owner):
        raise _not_found(response_id)
    return _json({"id": response_id, "object": "response", "deleted": True})


@router.post("/{response_id}/cancel", response_class=Response)
async def cancel_response(request: Request, response_id: str) -> Response:
    """End a background response. One that has ended already is given back as it is."""
    responses, owner = responses_of(request), _owner(request)
    run = responses.find_running(response_id, owner)
    if run is not None:
        return _json(await responses.cancel(run))
    body = await _stored_body(responses, response_id, owner)
    if not body["background"]:
        raise ApiError(
            f"response {response_id[:100]!r} was not made in the background; only such can be cancelled",
            code="not_cancellable",
        )
    if responses.shared is not None and body["status"] in RUNNING:
        cancelled = await cancel_elsewhere(responses.shared, response_id, owner)
        if cancelled is None:
            raise _not_found(response_id)
        return _json(cancelled)
    return _json(body)


@router.get("/{response_id}/input_items", response_class=Response)
async def list_input_items(
    request: Request,
    response_id: str,
    limit: int = 20,
    order: str = "desc",
    after: str | None = None,
    before: str | None = None,
) -> Response:
    """The input of a response's request, a page at a time; newest first unless order is asc."""
    responses, owner = responses_of(request), _owner(request)
    if not 1 <= limit <= MAX_PAGE:
        raise ApiError(f"limit is {limit:,}; expected 1 to {MAX_PAGE}", param="limit", code="invalid_value")
    if order not in ("asc", "desc"):
        raise ApiError(f"order is {order[:40]!r}; expected asc or desc", param="order", code="invalid_value")
    items = await in_store_thread(responses.store.input_items, response_id, owner)
    if items is None:
        raise _not_found(response_id)
    return _json(_page(items if order == "asc" else items[::-1], limit, after, before))


def _page(items: list[dict[str, Any]], limit: int, after: str | None, before: str | None) -> dict[str, Any]:
    """The items after (or before) the one of this id, as many as the limit."""
    ids = [item["id"] for item in items]
    for name, given in (("after", after), ("before", before)):
        if given is not None and given not in ids:
            raise ApiError(
                f"{name} is {given[:100]!r}; the response has no input item of this id", param=name
            )
    if after is not None:
        items = items[ids.index(after) + 1 :]
    elif before is not None:
        items = items[: ids.index(before)]
    page = items[-limit:] if before is not None and after is None else items[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(page) < len(items),
    }


async def _prepare(request: Request, body: ResponsesRequest) -> PreparedResponse:
    return await in_store_thread(
        prepare_response,
        state_of(request),
        responses_of(request).store,
        body,
        response_id=f"resp_{uuid.uuid4().hex}",
        created_at=int(time.time()),
        owner=_owner(request),
    )


async def _stored_body(responses: Responses, response_id: str, owner: str) -> dict[str, Any]:
    body = await in_store_thread(responses.store.body, response_id, owner)
    if body is None:
        raise _not_found(response_id)
    return body


def _not_found(response_id: str) -> ApiError:
    return ApiError(
        f"response {response_id[:100]!r} is not stored here",
        status=404,
        type="invalid_request_error",
        param="response_id",
        code="response_not_found",
    )


async def _listed(events: list[dict[str, Any]]) -> AsyncGenerator[dict[str, Any], None]:
    for event in events:
        yield event


async def _encoded(
    events: AsyncGenerator[dict[str, Any], None], dialect: Dialect
) -> AsyncGenerator[bytes, None]:
    """The events as bytes. A defect on the way is the API's `error` event, then the end."""
    number = 0
    try:
        async for event in events:
            number = event["sequence_number"] + 1
            yield encode_event(event, dialect)
            if event["type"] in TERMINAL_TYPES:
                break
        if dialect == "open-responses":
            yield last_bytes(dialect)
    except Exception as error:
        log_defect(error, "a stream of a response")
        known = api_error(error)
        yield error_event(str(known), known.code, number, dialect)
    finally:
        await events.aclose()


def _json(value: object, headers: dict[str, str] | None = None) -> Response:
    return Response(encode_json(value), headers=headers, media_type="application/json")
