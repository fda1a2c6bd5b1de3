"""`harmonium serve`: listen first, load meanwhile, drain on SIGTERM.

The socket is open before the model is loaded, so that /health can say "loading". The first SIGTERM or Ctrl-C
refuses new answers and lets running ones end (at most drain_seconds); the second ends the process at once.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
from dataclasses import fields
from pathlib import Path
from types import FrameType

import uvicorn

from harmonium.config import EngineConfig, environment_api_keys, environment_text
from harmonium.engine.protocol import Engine
from harmonium.errors import ConfigError, EngineError
from harmonium.harmony.grammar_compile import tokenizer as build_grammar_tokenizer
from harmonium.harmony.messages import reasoning_effort
from harmonium.options import DEMO
from harmonium.script_file import scripted_engine
from harmonium.server.app import create_app
from harmonium.server.config import Limits, ServerConfig
from harmonium.server.logs import configure_logging
from harmonium.server.remote import RemoteSource, make_remote_engine, remote_source
from harmonium.server.responses_run import Responses
from harmonium.server.state import ServerState
from harmonium.server.store_threads import has_stuck_threads
from harmonium.server.stores import open_store
from harmonium.server.tracing import find_tracing

_log = logging.getLogger("harmonium.server")

SCRIPT_PREFIX = "script:"


def serve(arguments: argparse.Namespace, engine_config: EngineConfig) -> int:
    """Serve until a signal ends it. Returns the exit code. Raises ConfigError, and what loading raises."""
    config = server_config(arguments)
    print_remarks(arguments)
    source = _source(arguments)
    store = open_store(config)
    listener = listen(config.host, config.port)
    configure_logging(arguments.log_format)
    state = ServerState(config)
    state.tracing = find_tracing(arguments.otlp_endpoint)
    responses = Responses(state, store)
    server = DrainingServer(state, responses, _uvicorn_config(state, responses))
    with listener:
        code = asyncio.run(_run(server, listener, source, engine_config))
    if has_stuck_threads():
        os._exit(code)  # a database hangs, and nobody waits for it any more
    return code


def print_remarks(arguments: argparse.Namespace) -> None:
    """What the user should know of the options: those without effect here, a password that others may see."""
    for remark in (*(arguments.told or ()), *_shown_password(arguments.store_url)):
        print(f"harmonium: {remark}", file=sys.stderr)


def server_config(arguments: argparse.Namespace) -> ServerConfig:
    """The settings that options and environment give. Raises ConfigError."""
    names = {"both": ("reasoning_content", "reasoning")}
    return ServerConfig(
        host=arguments.host,
        port=arguments.port,
        model_names=tuple(arguments.served_model_name),
        api_keys=tuple(arguments.api_key) or environment_api_keys(),
        max_concurrency=arguments.max_concurrency,
        max_queue=arguments.max_queue,
        effort=reasoning_effort(arguments.effort),
        current_date=arguments.date,
        cors_origins=tuple(arguments.cors),
        uses_grammar=not arguments.no_grammar,
        reasoning_fields=names.get(arguments.reasoning_field, (arguments.reasoning_field,)),
        allows_insecure=arguments.insecure,
        allows_adapter_updates=arguments.allow_lora_updates,
        drain_seconds=arguments.drain_timeout,
        store_path=arguments.store,
        store_url=arguments.store_url or environment_text("HARMONIUM_STORE_URL") or None,
        limits=_limits(arguments.limit),
    )


def _shown_password(store_url: str | None) -> list[str]:
    """What there is to say of a password on the command line."""
    user = (store_url or "").partition("://")[2].rpartition("@")[0]
    if ":" not in user:
        return []
    return ["the password in --store-url is seen by whoever may call ps; HARMONIUM_STORE_URL hides it"]


def _limits(given: list[str]) -> Limits:
    known = [limit.name for limit in fields(Limits)]
    found: dict[str, int] = {}
    for text in given:
        name, _, number = text.partition("=")
        if name not in known or not number.isdecimal():
            raise ConfigError(f"--limit is {text!r}; expected NAME=N with a name of {', '.join(known)}")
        found[name] = int(number)
    return Limits(**found)


def _source(arguments: argparse.Namespace) -> str | Path | RemoteSource:
    """The word MODEL, a script, or servers of vLLM; with nothing given, the demo model."""
    remote = remote_source(arguments)
    if remote is not None:
        return remote
    engine, model = arguments.engine, arguments.model
    if engine in ("native", "torch"):
        engine = None
    if engine is not None and not engine.startswith(SCRIPT_PREFIX):
        raise ConfigError(f"--engine is {engine!r}; expected native, torch, vllm=URL or {SCRIPT_PREFIX}FILE")
    if engine is not None and model is not None:
        raise ConfigError("both MODEL and --engine script:FILE are given; expected one")
    if engine is not None:
        return Path(engine.removeprefix(SCRIPT_PREFIX))
    return DEMO if model is None else str(model)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError when host or port cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {host}, port {port}: {reason}") from None


def _uvicorn_config(state: ServerState, responses: Responses) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(state, responses),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        h11_max_incomplete_event_size=64 << 10,
        timeout_graceful_shutdown=5,
    )


async def wait_until_empty(state: ServerState) -> None:
    """Return when no answer runs any more, or the time that they have is over."""
    seconds = state.config.drain_seconds
    if state.num_held:
        _log.info("draining: %d answers may end within %g s", state.num_held, seconds)
    end = asyncio.get_running_loop().time() + seconds
    while state.num_held and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.05)


class DrainingServer(uvicorn.Server):
    """uvicorn, whose first signal drains before it stops and whose second ends the process."""

    def __init__(self, state: ServerState, responses: Responses, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.state = state
        self.responses = responses
        self._drain: asyncio.Task[None] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.failure: EngineError | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for SIGTERM and SIGINT, between two instructions of the main thread."""
        if self.state.status == "draining" or self.loop is None:
            os._exit(128 + sig)
        self.state.drain()
        self.loop.call_soon_threadsafe(self._begin_drain)

    def fail(self, failure: EngineError) -> None:
        """What computes for us is gone for good: end, with this as the reason."""
        self.failure = failure
        self.state.fail(str(failure))
        self.should_exit = True

    def _begin_drain(self) -> None:
        self._drain = asyncio.get_running_loop().create_task(self._stop_when_empty())

    async def _stop_when_empty(self) -> None:
        await wait_until_empty(self.state)
        if self.state.num_held and self.state.loaded_engine is not None:
            _log.warning("%d answers are cut off", self.state.num_held)
            await self.state.loaded_engine.close()  # they end with an error event
        self.should_exit = True


async def _run(
    server: DrainingServer,
    listener: socket.socket,
    source: str | Path | RemoteSource,
    config: EngineConfig,
) -> int:
    state = server.state
    server.loop = asyncio.get_running_loop()
    loading = asyncio.create_task(_load(server, source, config))
    try:
        _announce(state.config, listener)
        await server.serve(sockets=[listener])
    finally:
        if not loading.done():
            if isinstance(source, RemoteSource):
                loading.cancel()  # a vLLM that was started is stopped
                await asyncio.gather(loading, return_exceptions=True)
            os._exit(1)  # a thread may read weights, and nobody waits for them any more
        if state.loaded_engine is not None:
            await state.loaded_engine.close()
        await server.responses.close()
        if state.tracing is not None:
            await asyncio.to_thread(state.tracing.close)
    loading.result()
    if server.failure is not None:
        raise server.failure
    return 0


def _announce(config: ServerConfig, listener: socket.socket) -> None:
    host = f"[{config.host}]" if ":" in config.host else config.host
    _log.info("listening on http://%s:%d", host, listener.getsockname()[1])
    if not config.api_keys and config.allows_insecure:
        _log.warning("no API key is set: everybody who reaches this address may use it")


async def _load(server: DrainingServer, source: str | Path | RemoteSource, config: EngineConfig) -> None:
    """Make the engine and hand it to the state; when that fails, stop the server."""
    state = server.state
    try:
        engine = await _make_engine(server, source, config)
    except Exception as error:  # of any kind: requests would wait for a model that never comes
        state.fail(str(error))
        server.should_exit = True
        raise
    state.set_engine(engine)
    names = ", ".join((*state.model_names, *state.adapter_names))
    _log.info("ready: %s, context %d", names, engine.info.context_length)


def _check_adapter_names(config: EngineConfig, model_names: tuple[str, ...]) -> None:
    """Raises ConfigError for an adapter that no request could choose."""
    for source in config.lora:
        if source.name in model_names:
            raise ConfigError(f"adapter {source.name!r} has the name of the model; expected another")


async def _make_engine(
    server: DrainingServer, source: str | Path | RemoteSource, config: EngineConfig
) -> Engine:
    state = server.state
    if isinstance(source, RemoteSource):
        remote = await make_remote_engine(source, config, server.fail)
        await prepare_grammar(state)
        return remote
    if isinstance(source, Path):
        if config.lora:
            raise ConfigError("--lora is given with --engine script:FILE, which computes with no weights")
        return await asyncio.to_thread(
            scripted_engine, source, context_length=config.context_length or 131_072
        )
    return await load_model(state, source, config)


async def load_model(state: ServerState, model: str, config: EngineConfig) -> Engine:
    """The native engine over the model of this word; the state hears how far loading is.

    Raises what finding and loading raise.
    """
    # Here: a script needs no native kernels.
    from harmonium.engine.create import create_engine
    from harmonium.loading import find_model, model_name, progress_bar

    path = await asyncio.to_thread(find_model, model)  # a download may take an hour
    _check_adapter_names(config, state.config.model_names or (model_name(path),))
    with progress_bar(f"loading {path.name}") as bar:

        def progress(done: int, total: int) -> None:
            state.loaded_fraction = done / total if total else 0.0
            if bar is not None:
                bar(done, total)

        engine = await asyncio.to_thread(create_engine, path, config, progress)
    await prepare_grammar(state)
    return engine


async def prepare_grammar(state: ServerState) -> None:
    """1.3 s that the first schema would wait for."""
    if state.config.uses_grammar:
        await asyncio.to_thread(build_grammar_tokenizer)
