"""Every failure as OpenAI's error object with the status that it deserves; under /v1/messages as Anthropic's.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
{"type": "error", "error": {"type": ..., "message": ...}, "request_id": ...}
"""

from __future__ import annotations

import json
import logging
import math
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from harmonium.errors import ApiError, EngineBusy, HarmoniumError, PromptTooLong

_log = logging.getLogger("harmonium.server")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
MESSAGES_PATH = "/v1/messages"
"""Under it answers, failures included, are Anthropic's."""

THREAD_UNSUPPORTED = "thread_unsupported_request"
"""Tells Anthropic's clients to send the whole conversation each time."""

_MESSAGES_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_FIELD = re.compile(r"([a-z_]+(?:\[\d+\])?(?:\.[A-Za-z_$]+(?:\[\d+\])?)*) (?:is|has|differs|holds|names)\b")
"""Our messages start with the field they are about: "messages[0].role is 'x'; expected ..."."""


def api_error(error: BaseException) -> ApiError:
    """The error as the API answers it. What nobody foresaw becomes a 500 that tells nothing of the inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineBusy):
        return busy(str(error), error.retry_after_seconds)
    if isinstance(error, PromptTooLong):
        return ApiError(str(error), status=400, code=error.code, param="messages")
    if isinstance(error, HarmoniumError):
        retry = 5.0 if error.status == 503 else None
        return ApiError(
            str(error),
            status=error.status,
            type=error_type(error.status),
            code=error.code,
            param=_param(str(error)) if error.status < 500 else None,
            retry_after_seconds=retry,
        )
    return ApiError(
        "the server met a defect of its own; its log says more", status=500, code="internal_error"
    )


def busy(reason: str, retry_after_seconds: float) -> ApiError:
    """429. The words "try again in Ns" are what some clients read their waiting time from."""
    seconds = max(1, math.ceil(retry_after_seconds))
    return ApiError(
        f"{reason}. Please try again in {seconds}s.",
        status=429,
        type="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after_seconds=seconds,
    )


def error_type(status: int) -> str:
    """OpenAI's word for errors of this status."""
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def _param(message: str) -> str | None:
    found = _FIELD.match(message)
    return found.group(1) if found else None


def error_object(error: BaseException) -> dict[str, Any]:
    """{"error": {...}}: the body of a failed request, or the last event of a failed stream."""
    known = api_error(error)
    return {
        "error": {
            "message": str(known),
            "type": known.type or error_type(known.status),
            "param": known.param,
            "code": known.code,
        }
    }


def messages_error_object(error: BaseException, request_id: str | None) -> dict[str, Any]:
    """Anthropic's error object: the body of a failed request, or the data of a stream's `error` event.

    A prompt that is too long says so in Anthropic's words: clients look for them.
    """
    known = api_error(error)
    usual = "invalid_request_error" if known.status < 500 else "api_error"
    prefix = "prompt is too long: " if isinstance(error, PromptTooLong) else ""
    body: dict[str, Any] = {
        "type": _MESSAGES_TYPES.get(known.status, usual),
        "message": f"{prefix}{known}",
    }
    if known.code == THREAD_UNSUPPORTED:
        body["details"] = {"error_code": known.code}
    return {"type": "error", "error": body, "request_id": request_id}


def error_response(error: BaseException) -> Response:
    """The whole answer to a request that failed before anything was sent."""
    return _ErrorResponse(error)


class _ErrorResponse(Response):
    """A failure; the path that was asked for says in which API's words."""

    media_type = "application/json"

    def __init__(self, error: BaseException) -> None:
        known = api_error(error)
        headers = dict(known.headers)
        if known.retry_after_seconds is not None:
            headers["retry-after"] = str(max(1, math.ceil(known.retry_after_seconds)))
        super().__init__(json.dumps(error_object(known)), known.status, headers=headers)
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path == MESSAGES_PATH or path.startswith(f"{MESSAGES_PATH}/"):
            request_id = scope.get("state", {}).get("request_id")
            self.body = self.render(json.dumps(messages_error_object(self._error, request_id)))
            self.headers["content-length"] = str(len(self.body))
            if request_id is not None:
                self.headers["request-id"] = request_id
        await super().__call__(scope, receive, send)


def wrong_value(where: str, value: object, expected: str) -> ApiError:
    """400: the field `where` is this value, and should be something else."""
    shown = "missing" if value is None else _shown(value)
    return ApiError(f"{where} is {shown}; expected {expected}", param=where, code="invalid_value")


def log_defect(error: BaseException, where: str) -> None:
    """Our own defect goes into the log with its traceback; what a client did wrong does not."""
    if not isinstance(error, HarmoniumError):
        _log.error("defect in %s", where, exc_info=error)


def validation_error(error: ValidationError, data: Any) -> ApiError:
    """A body that has not the shape of its model: the first thing that is wrong, named as OpenAI does.

    data: the body. Where a field may be one of several types, all of them are named.
    """
    errors = error.errors(include_url=False, include_context=False)
    first = errors[0]
    is_missing = first["type"] == "missing"
    param = param_name(_place(first["loc"], data, is_missing))
    if is_missing:
        return ApiError(f"{param} is missing", param=param, code="missing_required_parameter")
    same = [e["msg"].lower() for e in errors if param_name(_place(e["loc"], data, False)) == param]
    wanted = " or ".join(dict.fromkeys(same))
    message = f"{param or 'the body'} is {_shown(first.get('input'))}: {wanted}"
    return ApiError(message, param=param or None, code="invalid_value")


def _place(location: tuple[int | str, ...], data: Any, is_missing: bool) -> tuple[int | str, ...]:
    """The steps of the location that are the client's: pydantic puts names of types between them."""
    steps: list[int | str] = []
    for number, step in enumerate(location):
        has_name = isinstance(data, dict) and step in data
        if has_name or (isinstance(data, list) and isinstance(step, int) and step < len(data)):
            data = data[step]
        elif not (is_missing and number == len(location) - 1):
            continue
        steps.append(step)
    return tuple(steps)


def param_name(location: tuple[int | str, ...]) -> str:
    """('messages', 0, 'role') -> "messages[0].role"."""
    name = ""
    for step in location:
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
    return name


def _shown(value: object) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value, default=lambda other: type(other).__name__)
    return text if len(text) <= 80 else f"{text[:77]}..."


async def _answer_harmonium(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _answer_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = param_name(tuple(first["loc"])[1:])
    return error_response(ApiError(f"{name}: {first['msg']}", status=400, param=name, code="invalid_value"))


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"no such path: {request.method} {request.url.path[:200]}"
    elif error.status_code == 405:
        message = f"{request.method} is not allowed for {request.url.path[:200]}"
    headers = dict(error.headers or {})
    return error_response(ApiError(message, status=error.status_code, code=None, headers=headers))


def add_error_handlers(app: FastAPI) -> None:
    """From here on every failure leaves the app as an error object."""
    app.add_exception_handler(HarmoniumError, _answer_harmonium)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_http)
