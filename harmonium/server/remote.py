"""`--engine vllm=URL,...` and `--launch-vllm`: the engine that they mean."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from harmonium.config import EngineConfig, child_environment, environment_text
from harmonium.engine.connect import Wanted, connect, parse_upstreams
from harmonium.engine.protocol import Engine
from harmonium.engine.remote import RemoteEngine
from harmonium.engine.upstream import RemoteSettings, Upstream
from harmonium.engine.vllm_process import VllmCommand, VllmProcess, vllm_command
from harmonium.errors import ConfigError, EngineError
from harmonium.hub.names import SHORT_NAMES

_log = logging.getLogger("harmonium.server")

VLLM_PREFIX = "vllm="

_TELL_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class RemoteSource:
    """What the command line says. model: the word MODEL, None where there is none. urls: of servers that
    run; (): one is started with `command` and `arguments`.
    """

    model: str | None
    urls: tuple[str, ...] = ()
    command: str = "vllm"
    arguments: tuple[str, ...] = ()


def remote_source(arguments: argparse.Namespace) -> RemoteSource | None:
    """None where neither option is given. Raises ConfigError for both, and for addresses that are none."""
    engine: str | None = arguments.engine
    is_remote = engine is not None and engine.startswith(VLLM_PREFIX)
    if not arguments.launch_vllm:
        if arguments.vllm_arguments:
            raise ConfigError("words stand behind -- and --launch-vllm is not given; they are for vLLM")
        if not is_remote or engine is None:
            return None
        urls = tuple(engine.removeprefix(VLLM_PREFIX).split(","))
        parse_upstreams(urls, RemoteSettings())
        return RemoteSource(arguments.model, urls)
    if engine is not None:
        raise ConfigError(f"--launch-vllm and --engine {engine} are given; expected one")
    if arguments.model is None:
        raise ConfigError("--launch-vllm needs MODEL: a hub's name or a folder, as vLLM takes it")
    source = RemoteSource(arguments.model, (), arguments.vllm_command, tuple(arguments.vllm_arguments))
    vllm_command(source.command, model_word(arguments.model), source.arguments)
    return source


def model_word(word: str) -> str:
    """The model as vLLM takes it: our short names (20b, 120b) are the hub's."""
    return f"openai/{SHORT_NAMES[word]}" if word in SHORT_NAMES else word


def settings() -> RemoteSettings:
    """The defaults, with the key that the environment gives."""
    key = environment_text("HARMONIUM_VLLM_API_KEY") or environment_text("VLLM_API_KEY")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError("HARMONIUM_VLLM_API_KEY has letters that no key has")
    return RemoteSettings(api_key=key)


async def make_remote_engine(
    source: RemoteSource, config: EngineConfig, failed: Callable[[EngineError], None]
) -> Engine:
    """Wait for the servers, or start one and wait for it; `failed` is called when it cannot be kept running.

    Cancelled, it leaves no child behind. Raises ConfigError, UpstreamUnavailable, EngineError.
    """
    if config.lora:
        raise ConfigError("--lora is given; a vLLM takes its adapters by --lora-modules of its own")
    names = () if source.model is None else tuple(dict.fromkeys((source.model, model_word(source.model))))
    wanted = Wanted(names, config.context_length)
    remote = settings()
    if source.urls:
        upstreams = parse_upstreams(source.urls, remote)
        return await connect(upstreams, wanted, remote, _Teller("waiting for vLLM").tell)
    assert source.model is not None, "checked with the options"
    key = remote.api_key or secrets.token_urlsafe(32)  # it is ours alone
    remote = replace(remote, api_key=key)
    environment = child_environment({"VLLM_API_KEY": key})
    command = vllm_command(source.command, model_word(source.model), source.arguments, environment)
    return await _launch(command, wanted, remote, failed)


async def _launch(
    command: VllmCommand, wanted: Wanted, remote: RemoteSettings, failed: Callable[[EngineError], None]
) -> RemoteEngine:
    process = VllmProcess(command)
    _log.info("starting: %s", " ".join(command.words))
    await process.start()
    try:
        engine = await _ready(process, parse_upstreams([command.address], remote), wanted, remote)
    except BaseException:
        await process.stop()
        raise
    engine.on_close(process.stop)
    process.keep(failed)
    return engine


async def _ready(
    process: VllmProcess, upstreams: list[Upstream], wanted: Wanted, remote: RemoteSettings
) -> RemoteEngine:
    """The engine when the child answers. Raises EngineError when it ends before."""
    teller = _Teller("vLLM starts")

    def tell(why: str) -> None:
        teller.tell(process.last_line or why)

    # The names in `wanted` are what the child was told, so it has them under one of them.
    connecting = asyncio.create_task(connect(upstreams, wanted, remote, tell))
    dying = asyncio.create_task(process.died())
    try:
        await asyncio.wait({connecting, dying}, return_when=asyncio.FIRST_COMPLETED)
        if not connecting.done():
            raise dying.result()
        return connecting.result()
    finally:
        for task in (connecting, dying):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(connecting, dying, return_exceptions=True)


class _Teller:
    """Logs how a wait goes, at its start and every 15 s."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._began = self._next = time.monotonic()

    def tell(self, what: str) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _TELL_SECONDS
            _log.info("%s (%.0f s): %s", self._title, now - self._began, what)
