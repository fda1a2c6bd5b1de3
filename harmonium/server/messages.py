"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, as Claude Code and others speak it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from harmonium.chat import ChatRequest
from harmonium.chat_events import Finish
from harmonium.harmony.render import render_prompt
from harmonium.server.body import ignored_headers, read_model, request_schema
from harmonium.server.errors import MESSAGES_PATH, log_defect, messages_error_object
from harmonium.server.messages_input import prepare_message, read_conversation
from harmonium.server.messages_output import AnswerFacts, MessageEvents, message_json
from harmonium.server.messages_schema import MessagesRequest, PromptFields, without_effect
from harmonium.server.responses import responses_of
from harmonium.server.responses_seal import Seal
from harmonium.server.sse import encode_json, event, event_stream, unless_gone
from harmonium.server.state import ServerState, state_of
from harmonium.server.turns import Turn, check_finish, open_turn

router = APIRouter(prefix=MESSAGES_PATH)


@router.post("", response_class=Response, openapi_extra=dict(request_schema(MessagesRequest)))
async def create_message(request: Request) -> Response:
    """Anthropic's Messages API; docs/api.md lists every field and what differs."""
    state, seal = state_of(request), _seal(request)
    body = await read_model(request, MessagesRequest)
    model = state.check_model(body.model)
    message_id = f"msg_{uuid.uuid4().hex}"
    owner = state.owner_of(request.headers)
    prepared = await asyncio.to_thread(prepare_message, state, body, seal, message_id, owner)
    facts = AnswerFacts(
        message_id=message_id,
        model=model,
        max_tokens=body.max_tokens,
        context_length=state.engine.info.context_length,
        thinking=prepared.thinking,
        has_tools=bool(body.tools),
        seal=seal,
    )
    headers = _headers(request, body)
    if body.stream:
        turn = await open_turn(state, prepared.chat_request)
        return event_stream(request, _events(facts, turn, headers["request-id"]), headers)
    answer = await unless_gone(request, _whole(state, facts, prepared.chat_request))
    return Response(encode_json(answer), headers=headers, media_type="application/json")


@router.post("/count_tokens", response_class=Response, openapi_extra=dict(request_schema(PromptFields)))
async def count_tokens(request: Request) -> Response:
    """How many tokens the prompt of this request has: what `usage` of its answer would say."""
    state, seal = state_of(request), _seal(request)
    body = await read_model(request, PromptFields)
    state.check_model(body.model)
    count = await asyncio.to_thread(_num_tokens, state, body, seal)
    headers = _headers(request, body)
    return Response(encode_json({"input_tokens": count}), headers=headers, media_type="application/json")


def _num_tokens(state: ServerState, body: PromptFields, seal: Seal) -> int:
    return len(render_prompt(read_conversation(state, body, seal)))


def _seal(request: Request) -> Seal:
    """What signs thinking: the same key as that of sealed reasoning in the Responses API."""
    return responses_of(request).store.seal


def _headers(request: Request, body: PromptFields) -> dict[str, str]:
    """request-id is where Anthropic's clients look for it; it is the same as x-request-id."""
    ignored = ignored_headers(body, without_effect(body, state_of(request).config.uses_grammar))
    return {"request-id": request.state.request_id, **ignored}


async def _whole(state: ServerState, facts: AnswerFacts, request: ChatRequest) -> dict[str, Any]:
    """The answer in one piece. Raises what the turn raises."""
    async with await open_turn(state, request) as turn:
        return message_json(facts, await turn.result())


async def _events(facts: AnswerFacts, turn: Turn, request_id: str) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events; closing the generator aborts the turn."""
    try:
        events = MessageEvents(facts)
        async for chat_event in turn:
            if isinstance(chat_event, Finish):
                check_finish(chat_event)
            for data in events.push(chat_event):
                yield event(data, data["type"])
    except Exception as error:
        log_defect(error, "a stream of a message")
        yield event(messages_error_object(error, request_id), "error")
    finally:
        await turn.aclose()
