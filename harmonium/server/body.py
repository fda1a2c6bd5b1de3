"""A request's body -> a validated model. Whatever the bytes are, the answer is a model or an ApiError."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from harmonium.errors import ApiError
from harmonium.server.errors import validation_error
from harmonium.server.state import state_of

IGNORED_HEADER = "x-harmonium-ignored"
"""Names the fields of the request that nobody here knows."""

_MAX_IGNORED_CHARS = 512


class RequestModel(BaseModel):
    """Base of request bodies: types are taken strictly, unknown fields are kept to be named in a header."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=(), frozen=True)


Model = TypeVar("Model", bound=RequestModel)


async def read_model(request: Request, model: type[Model]) -> Model:
    """The body as this model. Raises ApiError: 400, 408, 413, 415."""
    return validated(model, await read_json(request))


def validated(model: type[Model], data: Any) -> Model:
    """JSON as this model. Raises ApiError that names the first field that is wrong."""
    if not isinstance(data, dict):
        raise ApiError("the body is no JSON object", code="invalid_json")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise validation_error(error, data) from None
    except RecursionError:
        raise ApiError("the body is nested too deep", code="invalid_json") from None


async def read_json(request: Request) -> Any:
    """The body's JSON: at most 200 levels deep, finite numbers, integers of at most 4,300 digits."""
    _check_headers(request)
    content = await read_body(request)
    try:
        data = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from None
    _check_numbers(data)
    return data


def _check_headers(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(
            f"content-encoding is {encoding[:40]!r}; expected a body that is not compressed",
            status=415,
            code="unsupported_encoding",
        )
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type not in ("", "application/json") and not media_type.endswith("+json"):
        # A web page may send text/plain anywhere without asking; application/json it may not.
        raise ApiError(
            f"content-type is {media_type[:80]!r}; expected application/json",
            status=415,
            code="unsupported_media_type",
        )


async def read_body(request: Request) -> bytes:
    """The body's bytes. Raises ApiError: 413 when it is too large, 408 when it takes too long."""
    state = state_of(request)
    most = state.config.limits.body_bytes
    parts: list[bytes] = []
    size = 0

    async def read() -> None:
        nonlocal size
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise too_large(most)
            parts.append(part)

    try:
        await asyncio.wait_for(read(), state.config.body_seconds)
    except asyncio.TimeoutError:
        raise ApiError(
            f"the body was not here after {state.config.body_seconds:g} s", status=408, code="request_timeout"
        ) from None
    except ClientDisconnect:
        raise ApiError("the client left", status=499, code="client_closed_request") from None
    return b"".join(parts)


def too_large(most: int) -> ApiError:
    """413, with the limit."""
    return ApiError(
        f"the body has more than {most:,} bytes",
        status=413,
        code="request_too_large",
        headers={"connection": "close"},
    )


def _check_numbers(data: Any) -> None:
    """Infinity can still come from 1e999. Iterative: the depth is the client's choice."""
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ApiError("the body is not JSON: a number is out of range", code="invalid_json")


def ignored_headers(model: RequestModel, without_effect: Iterable[str] = ()) -> dict[str, str]:
    """The header that names the request's unknown fields; {} where there are none.

    without_effect: fields that are known and change nothing.
    """
    names = ",".join([*_unknown("", model), *without_effect])
    if not names:
        return {}
    text = names if len(names) <= _MAX_IGNORED_CHARS else f"{names[: _MAX_IGNORED_CHARS - 3]}..."
    return {IGNORED_HEADER: text.encode("ascii", "replace").decode().translate(_NO_CONTROLS)}


_NO_CONTROLS = dict.fromkeys([*range(32), 127], "?")


def _unknown(prefix: str, value: object) -> Iterator[str]:
    if isinstance(value, RequestModel):
        yield from (f"{prefix}{name}" for name in value.model_extra or {})
        for name in type(value).model_fields:
            yield from _unknown(f"{prefix}{name}.", getattr(value, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, RequestModel):
                yield from _unknown(f"{prefix[:-1]}[{index}].", item)


def request_schema(model: type[RequestModel]) -> Mapping[str, Any]:
    """What a route tells OpenAPI of its body, which it reads itself."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    schema = _inlined(schema, definitions)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """The schema with its references replaced by what they mean: a route has no place for definitions."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    reference = schema.get("$ref")
    if isinstance(reference, str):
        return _inlined(definitions[reference.rsplit("/", 1)[-1]], definitions)
    return {key: _inlined(item, definitions) for key, item in schema.items()}
