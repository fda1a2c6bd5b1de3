"""Several replicas of the native engine and the whole front end on Ray Serve: `harmonium.ray:app`.

    harmonium serve demo --replicas 2
    serve run harmonium.ray:app model=demo replicas=2

A replica is what `harmonium serve` is without the socket: Ray's proxies listen, choose one of two replicas
by how much they do, and carry streams and disconnects. Needs the extra [ray]; docs/cluster.md says what is
shared. Source: Ray Serve 2.60's documentation of `serve.ingress` with a builder, application builders and
autoscaling.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from harmonium import options
from harmonium.config import EngineConfig, environment_config, set_environment_default
from harmonium.engine.protocol import Request
from harmonium.errors import ConfigError, EngineBusy, EngineError
from harmonium.loading import find_model
from harmonium.model.batch import SamplingParams
from harmonium.server.app import create_app
from harmonium.server.config import ServerConfig
from harmonium.server.logs import LogFormat, configure_logging
from harmonium.server.responses_run import Responses
from harmonium.server.serve import listen, load_model, print_remarks, server_config, wait_until_empty
from harmonium.server.state import ServerState
from harmonium.server.stores import open_store
from harmonium.server.tracing import find_tracing

if TYPE_CHECKING:
    from fastapi import FastAPI

APPLICATION = "harmonium"

_PROBE = Request("health", (0,), SamplingParams(max_tokens=1))
"""A request that is looked at and never made."""

_MISSING = "replicas need Ray: pip install 'harmonium[ray]'"


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many there are at least and at most."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Replicas:
        """From "N" or "MIN:MAX". Raises ConfigError."""
        least, colon, most = text.partition(":")
        try:
            found = cls(int(least), int(most if colon else least))
        except ValueError:
            found = cls(0, 0)
        if not 1 <= found.least <= found.most:
            raise ConfigError(f"--replicas is {text[:40]!r}; expected N or MIN:MAX with 1 <= MIN <= MAX")
        return found


@dataclass(frozen=True, slots=True)
class Settings:
    """What a replica is made from. model: the word MODEL; the others as `harmonium serve` has them."""

    replicas: Replicas
    config: ServerConfig
    engine_config: EngineConfig
    model: str
    log_format: LogFormat = "text"
    otlp_endpoint: str | None = None


def app(args: Mapping[str, Any]) -> Any:
    """The Serve application, for `serve run` and configuration files.

    args: options of `harmonium serve` by their names with _ for -, besides `model` and `replicas` ("2" or
    "1:4"); true or an empty value is an option without one. Raises ConfigError as `harmonium serve` does.
    """
    return application(_settings(parse(args)))


def parse(args: Mapping[str, Any]) -> argparse.Namespace:
    """What `harmonium serve` makes of these options. Raises ConfigError for one that it does not know."""
    words = ["serve", *([str(args["model"])] if "model" in args else [])]
    for name, value in args.items():
        if name != "model":
            words += [f"--{name.replace('_', '-')}", *([] if value in ("", True) else [str(value)])]
    return options.parse(words)


def _settings(arguments: argparse.Namespace) -> Settings:
    """Raises ConfigError for what does not go with replicas."""
    replicas = Replicas.parse(arguments.replicas or "1")
    if arguments.launch_vllm or arguments.engine not in (None, "native"):
        raise ConfigError("--replicas are of the native engine; vLLM has replicas of its own (docs/vllm.md)")
    arguments.max_sequences = arguments.max_concurrency
    config, engine_config = server_config(arguments), options.engine_config(arguments)
    if config.store_path is not None:
        raise ConfigError("--store FILE is one server's; replicas share --store-url (docs/store.md)")
    if replicas.most > 1 and config.store_url is None:
        raise ConfigError(
            "more than one replica needs --store-url, or a response would be known to one of them alone; "
            "sqlite:///FILE does on one machine, PostgreSQL on several (docs/store.md)"
        )
    if config.allows_adapter_updates:
        raise ConfigError("--allow-lora-updates would change one replica alone; give adapters with --lora")
    if config.port == 0:
        raise ConfigError("--port is 0; replicas listen on a port that is named")
    if engine_config.threads is None:
        given = environment_config().get("threads")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = given if isinstance(given, int) else max(1, cores // replicas.most)
        engine_config = replace(engine_config, threads=threads)
    model = arguments.model or options.DEMO
    return Settings(replicas, config, engine_config, model, arguments.log_format, arguments.otlp_endpoint)


def _ray() -> tuple[Any, Any]:
    """(ray, ray.serve). Raises ConfigError where they are missing."""
    set_environment_default("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray import serve
    except ImportError:
        raise ConfigError(_MISSING) from None
    return ray, serve


def _join(ray: Any, address: str | None, settings: Settings) -> None:
    """Connect to a cluster, or start one on this machine alone. Raises ConfigError."""
    if address is not None:
        _check_reachable(address)
        try:
            ray.init(address=address, log_to_driver=True)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"no Ray cluster at {address}: {error}") from None
        return
    ray.init(address="local", include_dashboard=False, log_to_driver=True)
    least, threads = settings.replicas.least, settings.engine_config.threads or 1
    wanted, there = threads * least, int(ray.cluster_resources().get("CPU", 0))
    if wanted > there:
        ray.shutdown()
        raise ConfigError(f"{least} replicas of {threads} threads want {wanted} cores; there are {there}")


def _check_reachable(address: str) -> None:
    """Raises ConfigError where nobody listens: Ray itself would try for minutes."""
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except ValueError:
        raise ConfigError(f"--ray-address is {address[:80]!r}; expected HOST:PORT, or auto") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"no Ray cluster at {address[:80]}: {reason}") from None


def serve_replicas(arguments: argparse.Namespace) -> int:
    """`harmonium serve --replicas`: deploy, wait for a signal, take it down. Returns the exit code.

    Raises ConfigError, and EngineError where the replicas do not come up.
    """
    settings = _settings(arguments)
    print_remarks(arguments)
    config = settings.config
    ray, serve = _ray()
    if arguments.ray_address is None:
        # Here a mistake has one line, and a download happens once.
        from harmonium.engine.create import plan_engine  # native kernels are needed from here on

        plan_engine(find_model(settings.model), settings.engine_config)
    listen(config.host, config.port).close()  # Ray's proxy tells of a port that is taken with a traceback
    _join(ray, arguments.ray_address, settings)
    is_over = _ended_by_signal()
    try:
        try:
            serve.start(http_options={"host": config.host, "port": config.port})
            serve.run(application(settings), name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise EngineError(f"the replicas do not come up: {error}") from None
        print(f"ready: {settings.model} at http://{config.host}:{config.port}", file=sys.stderr, flush=True)
        is_over.wait()
    finally:
        serve.delete(APPLICATION)  # a joined cluster may have other applications
        if arguments.ray_address is None:
            serve.shutdown()
        ray.shutdown()
    return 0


def _ended_by_signal() -> threading.Event:
    """Set by SIGTERM and SIGINT; the second ends the process at once."""
    is_over = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        if is_over.is_set():
            os._exit(128 + number)
        is_over.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    return is_over


def application(settings: Settings) -> Any:
    """The bound deployment of these settings."""
    _, serve = _ray()
    config, replicas = settings.config, settings.replicas
    wanted: dict[str, Any] = {
        "name": "server",
        # Health, models and the like come beside the answers.
        "max_ongoing_requests": config.max_concurrency + config.max_queue + 16,
        # Requests first, then what runs in the background: each may take that long.
        "graceful_shutdown_timeout_s": 2 * config.drain_seconds + 5,
        "ray_actor_options": {"num_cpus": settings.engine_config.threads or 1},
        "health_check_period_s": 5,
    }
    if replicas.least == replicas.most:
        wanted["num_replicas"] = replicas.least
    else:
        wanted["autoscaling_config"] = {
            "min_replicas": replicas.least,
            "max_replicas": replicas.most,
            "target_ongoing_requests": config.max_concurrency,
        }
    return serve.deployment(**wanted)(serve.ingress()(Replica)).bind(settings)


class Replica:
    """One server in a process of Ray's, which is ready when its model is loaded."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        """Raises what loading and the store raise."""
        configure_logging(settings.log_format)
        self.state = ServerState(settings.config)
        self.state.tracing = find_tracing(settings.otlp_endpoint)
        self.responses = Responses(self.state, await asyncio.to_thread(open_store, settings.config))
        self.state.set_engine(await load_model(self.state, settings.model, settings.engine_config))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray after the constructor."""
        return create_app(self.state, self.responses)

    def check_health(self) -> None:
        """Called by Ray every few seconds, which replaces a replica that raises.

        Raises EngineClosed where the engine has stopped.
        """
        with contextlib.suppress(EngineBusy):
            self.state.engine.admit(_PROBE)

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
