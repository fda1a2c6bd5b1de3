"""What runs in Ray's processes: `Front`, our server without a model, and `EngineReplica`, a model alone.

The front end's engine is a RayEngine, which asks the replicas; docs/cluster.md says who does what. Ray makes
deployments of both in harmonium/ray.py. Source: Ray Serve 2.60's documentation of `serve.ingress` with a
builder, of streaming handles, health checks and graceful shutdown.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from harmonium.config import EngineConfig
from harmonium.engine.local import LocalEngine
from harmonium.engine.protocol import EngineInfo, Request, Token, TokenEvent
from harmonium.engine.ray_engine import RayEngine, Route
from harmonium.engine.statistics import EngineStatistics
from harmonium.errors import EngineBusy
from harmonium.model.batch import SamplingParams
from harmonium.server.app import create_app
from harmonium.server.config import ServerConfig
from harmonium.server.logs import LogFormat, configure_logging
from harmonium.server.responses_run import Responses
from harmonium.server.serve import load_model, prepare_grammar, wait_until_empty
from harmonium.server.state import ServerState
from harmonium.server.stores import open_store
from harmonium.server.tracing import find_tracing

if TYPE_CHECKING:
    from fastapi import FastAPI

_PROBE = Request("health", (0,), SamplingParams(max_tokens=1))
"""A request that is looked at and never made."""

_ASK_SECONDS = 0.2
"""Between two questions for a replica of the front's own settings, while others are still there."""


_WATCH_SECONDS = 5.0
"""Between two looks at a front that has answers here."""

_log = logging.getLogger("harmonium.engine")


class FrontWatch:
    """Ends the answers of fronts that died: Ray lets them run on, for nobody."""

    def __init__(self, is_dead: Callable[[Any], Awaitable[bool]], seconds: float = _WATCH_SECONDS) -> None:
        """is_dead: of a front's handle. seconds: between two looks at it."""
        self._is_dead = is_dead
        self._seconds = seconds
        self._answers: dict[Any, set[asyncio.Task[Any]]] = {}
        self._watchers: set[asyncio.Task[None]] = set()

    @contextmanager
    def working(self, front: Any) -> Iterator[None]:
        """The current task works for a front (None: for nobody who is watched) and is cancelled with it."""
        task = asyncio.current_task()
        if front is None or task is None:
            yield
            return
        if front not in self._answers:
            self._answers[front] = set()
            watcher = asyncio.create_task(self._watch(front))
            self._watchers.add(watcher)
            watcher.add_done_callback(self._watchers.discard)
        answers = self._answers[front]
        answers.add(task)
        try:
            yield
        finally:
            answers.discard(task)

    async def _watch(self, front: Any) -> None:
        """Until the front has no answers here."""
        answers = self._answers[front]
        try:
            while answers:
                await asyncio.sleep(self._seconds)
                if answers and await self._is_dead(front):
                    _log.warning("a front died; %d answers of it are ended", len(answers))
                    for task in list(answers):
                        task.cancel()
                    return
        finally:
            del self._answers[front]


class EngineReplica:
    """One model in a process of Ray's, which is ready when it is loaded."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self,
        model: str,
        config: ServerConfig,
        engine_config: EngineConfig,
        log_format: LogFormat,
        version: str,
    ) -> None:
        """version: of these settings; fronts of the same ask for it. Raises what loading raises."""
        from harmonium.engine.ray_router import is_dead  # the one module that needs Ray at its import

        configure_logging(log_format)
        self.version = version
        self.fronts = FrontWatch(is_dead)
        self.engine = cast("LocalEngine", await load_model(ServerState(config), model, engine_config))

    async def info(self, route: Route) -> tuple[str, EngineInfo]:
        """The version of its settings, and what it serves."""
        return self.version, self.engine.info

    async def statistics(self, route: Route) -> EngineStatistics:
        """What it holds and did."""
        return self.engine.statistics

    async def generate(self, request: Request, route: Route) -> AsyncGenerator[TokenEvent, None]:
        """As RayEngine wants it: `began` is told in seconds from now, clocks of machines being different."""
        if request.constraint is not None:
            await asyncio.to_thread(request.constraint.start)  # it is compiled here, and then it is there
        with self.fronts.working(route.front):
            async with aclosing(self.engine.generate(request)) as events:
                async for event in events:
                    began = None if event.began is None else event.began - time.monotonic()
                    yield replace(event, began=began)

    async def score(
        self, token_ids: tuple[int, ...], num_top: int, adapter: str | None, route: Route
    ) -> tuple[Token, ...]:
        """As PromptScorer says."""
        return await self.engine.score(token_ids, num_top, adapter)

    def check_health(self) -> None:
        """Called by Ray every few seconds, which replaces a replica that raises.

        Raises EngineClosed where the engine has stopped.
        """
        with contextlib.suppress(EngineBusy):
            self.engine.admit(_PROBE)

    async def __del__(self) -> None:
        """Called by Ray when no call is here any more, or the time that they had is over."""
        if hasattr(self, "engine"):  # the constructor did not raise
            await self.engine.close()


class Front:
    """One server in a process of Ray's, which is ready when a replica of the same settings is."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self,
        handle: Any,
        config: ServerConfig,
        log_format: LogFormat,
        otlp_endpoint: str | None,
        version: str,
    ) -> None:
        """handle: of the engine's deployment. Raises what the store raises."""
        from harmonium.engine.ray_router import read_error, this_process

        configure_logging(log_format)
        self.state = ServerState(config)
        self.state.tracing = find_tracing(otlp_endpoint)
        self.responses = Responses(self.state, await asyncio.to_thread(open_store, config))
        await prepare_grammar(self.state)
        info = await _ask_info(handle, version)
        self.state.set_engine(RayEngine(handle, info, read_error, this_process()))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray after the constructor."""
        return create_app(self.state, self.responses)

    async def __del__(self) -> None:
        """Called by Ray when no request is here any more: what runs in the background may end."""
        if not hasattr(self, "responses"):
            return  # the constructor raised
        await wait_until_empty(self.state)
        self.state.drain()
        if self.state.loaded_engine is not None:
            await self.state.loaded_engine.close()
        await self.responses.close()
        if self.state.tracing is not None:
            await asyncio.to_thread(self.state.tracing.close)


async def _ask_info(handle: Any, version: str) -> EngineInfo:
    """Of a replica with these settings. While an update goes on there may be none yet."""
    while True:
        found, info = await handle.info.remote(Route())
        if found == version:
            return cast("EngineInfo", info)
        await asyncio.sleep(_ASK_SECONDS)
