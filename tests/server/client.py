"""A server over a scripted engine, and clients of it that need no socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import httpx

from harmonium.engine import ScriptedEngine
from harmonium.server import ServerConfig, ServerState, create_app
from tests.scripted_chat import gen
from tests.server.remote_states import engine_behind

BASE_URL = "http://127.0.0.1:8000"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]

T = TypeVar("T")


def make_state(*scripts: str, tokens_per_event: int = 1, **config: Any) -> ServerState:
    """A server whose model writes these scripts in turn; in them <|...|> is a special token."""
    engine = ScriptedEngine([gen(script) for script in scripts], tokens_per_event=tokens_per_event)
    return ServerState(ServerConfig(**config), engine)


def engine_of(state: ServerState) -> ScriptedEngine:
    engine = engine_behind(state.loaded_engine)
    assert isinstance(engine, ScriptedEngine)
    return engine


def prompt_text(state: ServerState, request: int = -1) -> str:
    """What the model was given to read."""
    from harmonium.harmony.vocabulary import vocabulary

    return vocabulary().decode(engine_of(state).requests[request].token_ids)


def with_client(state: ServerState, work: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
    """Run the work with a client of the app, in an event loop of its own."""

    async def run() -> T:
        transport = httpx.ASGITransport(create_app(state))
        async with httpx.AsyncClient(transport=transport, base_url=BASE_URL) as client:
            return await work(client)

    return asyncio.run(run())


def call(state: ServerState, method: str, path: str, **options: Any) -> httpx.Response:
    """One request."""
    return with_client(state, lambda client: client.request(method, path, **options))


def chat(state: ServerState, messages: Sequence[Any] = tuple(HELLO), **fields: Any) -> httpx.Response:
    """One chat completion."""
    return call(state, "POST", "/v1/chat/completions", json={"messages": list(messages), **fields})


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which must end in [DONE]."""
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]", events[-1]
    return [json.loads(event) for event in events[:-1]]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, which must be whole."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    error: dict[str, Any] = body["error"]
    return error
