"""Servers whose engine is reached through vLLM: a test's engine behind a stub, a RemoteEngine here."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from harmonium.engine import Engine, Request, ScriptedEngine, TokenEvent
from harmonium.engine.http_exchange import parse_address
from harmonium.engine.remote import RemoteEngine
from harmonium.engine.upstream import RemoteSettings, Upstream
from harmonium.server import ServerConfig, ServerState
from tests.vllm_stub import Stub, VllmServer

SETTINGS = RemoteSettings(max_corrections=0)
"""A script cannot be put right: what leaves the grammar is an error, as it is in a ScriptedEngine."""


class Reached(RemoteEngine):
    """A RemoteEngine that knows which engine lies behind its stub.

    Scripts that do not obey the grammar show what models do without one, so it is left out for them.
    """

    behind: Engine

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        engine = self.behind
        obeys = not isinstance(engine, ScriptedEngine) or any(
            script.obeys_constraint for script in engine._scripts
        )
        if not obeys:
            request = replace(request, constraint=None)
        async with aclosing(super().generate(request)) as events:
            async for event in events:
                yield event


class StubServer:
    """Started with the first engine that is put behind it."""

    def __init__(self) -> None:
        self._server: VllmServer | None = None

    def remote(self, engine: Engine) -> Reached:
        """An engine that reaches this one over HTTP."""
        if self._server is None:
            self._server = VllmServer()
            self._server.start()
        info = replace(engine.info, engine="vllm")
        url = self._server.add(Stub(engine, model=info.model_name, adapters=info.adapters))
        remote = Reached([Upstream(parse_address(url), SETTINGS, is_up=True)], info, SETTINGS)
        remote.behind = engine
        return remote

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


def engine_behind(engine: Engine | None) -> Engine | None:
    """The engine that a test made, wherever it runs."""
    return engine.behind if isinstance(engine, Reached) else engine


def remote_states(monkeypatch: pytest.MonkeyPatch, server: StubServer) -> None:
    """From now on every ServerState is given a RemoteEngine in place of its engine."""
    original = ServerState.__init__

    def make(state: ServerState, config: ServerConfig | None = None, engine: Engine | None = None) -> None:
        original(state, config, None if engine is None else server.remote(engine))

    def set_engine(state: ServerState, engine: Any) -> None:
        original_set(state, server.remote(engine))

    original_set = ServerState.set_engine
    monkeypatch.setattr(ServerState, "__init__", make)
    monkeypatch.setattr(ServerState, "set_engine", set_engine)
