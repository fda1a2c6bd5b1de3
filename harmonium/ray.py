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
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from harmonium import options
from harmonium.config import EngineConfig, environment_config, set_environment_default
from harmonium.engine.protocol import Request
from harmonium.errors import ConfigError, EngineBusy
from harmonium.model.batch import SamplingParams
from harmonium.server.config import ServerConfig
from harmonium.server.serve import server_config

if TYPE_CHECKING:
    from fastapi import FastAPI

    from harmonium.server.state import ServerState

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


def app(args: Mapping[str, Any]) -> Any:
    """The Serve application, for `serve run` and configuration files.

    args: options of `harmonium serve` by their names with _ for -, besides `model` and `replicas` ("2" or
    "1:4"); true or an empty value is an option without one. Raises ConfigError as `harmonium serve` does.
    """
    return application(*_settings(parse(args)))


def parse(args: Mapping[str, Any]) -> argparse.Namespace:
    """What `harmonium serve` makes of these options. Raises ConfigError for one that it does not know."""
    words = ["serve", *([str(args["model"])] if "model" in args else [])]
    for name, value in args.items():
        if name != "model":
            words += [f"--{name.replace('_', '-')}", *([] if value in ("", True) else [str(value)])]
    return options.parse(words)


def _settings(arguments: argparse.Namespace) -> tuple[Replicas, ServerConfig, EngineConfig, str]:
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
    return replicas, config, engine_config, arguments.model or options.DEMO


def _ray() -> tuple[Any, Any]:
    """(ray, ray.serve). Raises ConfigError where they are missing."""
    set_environment_default("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray import serve
    except ImportError:
        raise ConfigError(_MISSING) from None
    return ray, serve


def _join(ray: Any, address: str | None, replicas: Replicas, engine_config: EngineConfig) -> None:
    """Connect to a cluster, or start one on this machine alone. Raises ConfigError."""
    if address is not None:
        _check_reachable(address)
        try:
            ray.init(address=address, log_to_driver=True)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"no Ray cluster at {address}: {error}") from None
        return
    ray.init(address="local", include_dashboard=False, log_to_driver=True)
    wanted, there = (engine_config.threads or 1) * replicas.least, int(ray.cluster_resources().get("CPU", 0))
    if wanted > there:
        ray.shutdown()
        raise ConfigError(
            f"{replicas.least} replicas of {engine_config.threads} threads want {wanted} cores; "
            f"there are {there}"
        )


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
    """`harmonium serve --replicas`: deploy, wait for a signal, take everything down. Returns the exit code.

    Raises ConfigError.
    """
    replicas, config, engine_config, model = _settings(arguments)
    ray, serve = _ray()
    _join(ray, arguments.ray_address, replicas, engine_config)
    is_over = threading.Event()
    try:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: is_over.set())
        serve.start(http_options={"host": config.host, "port": config.port})
        serve.run(application(replicas, config, engine_config, model), name=APPLICATION, route_prefix="/")
        print(f"ready: {model} at http://{config.host}:{config.port}", file=sys.stderr, flush=True)
        is_over.wait()
    finally:
        if arguments.ray_address is None:
            serve.shutdown()
        else:
            serve.delete(APPLICATION)  # the cluster's other applications are not ours
        ray.shutdown()
    return 0


def application(replicas: Replicas, config: ServerConfig, engine_config: EngineConfig, model: str) -> Any:
    """The bound deployment of these settings."""
    _, serve = _ray()
    allowed = config.max_concurrency + config.max_queue
    wanted: dict[str, Any] = {
        "name": "server",
        "max_ongoing_requests": allowed + 16,  # health, models and the like beside the answers
        "graceful_shutdown_timeout_s": config.drain_seconds,
        "ray_actor_options": {"num_cpus": engine_config.threads or 1},
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

    def build() -> (
        FastAPI
    ):  # a function, and not another callable: those Ray takes for the application itself
        return _build(config, engine_config, model)

    ingress = serve.ingress(build)
    return serve.deployment(**wanted)(ingress(_Replica)).bind()


class _Replica:
    """What Ray asks beside requests."""

    def check_health(self) -> None:
        """Raises EngineClosed where the engine has stopped: the replica is then replaced."""
        for state in _states:
            if state.loaded_engine is not None:
                with contextlib.suppress(EngineBusy):
                    state.loaded_engine.admit(_PROBE)


_states: list[ServerState] = []


def _build(config: ServerConfig, engine_config: EngineConfig, model: str) -> FastAPI:
    """Load the model and make the application, in the replica's process."""
    from harmonium.engine.create import create_engine
    from harmonium.harmony.grammar_compile import tokenizer
    from harmonium.loading import find_model
    from harmonium.server.app import create_app
    from harmonium.server.responses_run import Responses
    from harmonium.server.state import ServerState
    from harmonium.server.stores import open_store

    state = ServerState(config)
    responses = Responses(state, open_store(config))
    state.set_engine(create_engine(find_model(model), engine_config))
    if config.uses_grammar:
        tokenizer()
    _states.append(state)
    return create_app(state, responses)
