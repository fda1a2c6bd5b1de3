"""Several replicas of the native engine behind our front end on Ray Serve: `harmonium.ray:app`.

    harmonium serve demo --replicas 2
    serve run harmonium.ray:app model=demo replicas=2

Ray's proxies listen and carry streams and disconnects to one of the fronts, each of which is what `harmonium
serve` is without socket and model; a front asks replicas of the engine (harmonium/ray_deployments.py). Needs
the extra [ray]; docs/cluster.md says what is shared. Source: Ray Serve 2.60's documentation of application
builders, composed deployments and autoscaling.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from types import FrameType
from typing import Any

from harmonium import options
from harmonium.config import EngineConfig, environment_config, set_environment_default
from harmonium.errors import ConfigError, EngineError
from harmonium.loading import find_model
from harmonium.ray_deployments import EngineReplica, Front
from harmonium.server.config import ServerConfig
from harmonium.server.logs import LogFormat
from harmonium.server.serve import listen, print_remarks, server_config

APPLICATION = "harmonium"

MAX_FRONTS = 2
"""One more than must be there, for the case that one dies: a front computes next to nothing."""

UPSCALE_SECONDS = 10.0
"""How long too much must be asked before a replica comes; a model is loaded in seconds."""

DOWNSCALE_SECONDS = 300.0
"""How long too little must be asked before one goes, with the prompts that it has in its cache."""

_MISSING = "replicas need Ray: pip install 'harmonium[ray]'"


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many there are of the engine at least and at most."""

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
    """What all is made from. model: the word MODEL; the others as `harmonium serve` has them for one."""

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
    """The bound deployments of these settings: fronts, and behind them replicas of the engine."""
    _, serve = _ray()
    config, threads = settings.config, settings.engine_config.threads or 1
    version = blake2b(repr((settings.model, settings.engine_config)).encode(), digest_size=8).hexdigest()
    engine = serve.deployment(
        name="engine",
        # What waits longer waits in the fronts, and goes to whichever replica has room first.
        max_ongoing_requests=config.max_concurrency + min(config.max_concurrency, config.max_queue),
        graceful_shutdown_timeout_s=config.drain_seconds + 5,
        ray_actor_options={"num_cpus": threads},
        health_check_period_s=5,
        max_constructor_retry_count=3,  # what loading raises it mostly raises again
        request_router_config=serve.config.RequestRouterConfig(
            request_router_class="harmonium.engine.ray_router:PrefixRouter", max_backoff_s=0.2
        ),
        **_scale(settings),
    )(EngineReplica)
    replicas = engine.bind(settings.model, config, settings.engine_config, settings.log_format, version)
    everything = _of_all(config, settings.replicas.most)
    front = serve.deployment(
        name="server",
        num_replicas=min(settings.replicas.most, MAX_FRONTS),
        # Health, models and the like come beside the answers.
        max_ongoing_requests=everything.max_concurrency + everything.max_queue + 16,
        # Requests first, then what runs in the background: each may take that long.
        graceful_shutdown_timeout_s=2 * config.drain_seconds + 5,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=5,
    )(serve.ingress()(Front))
    return front.bind(replicas, everything, settings.log_format, settings.otlp_endpoint, version)


def _of_all(config: ServerConfig, most: int) -> ServerConfig:
    """What a front may take: as many answers as all replicas together."""
    return replace(config, max_concurrency=config.max_concurrency * most, max_queue=config.max_queue * most)


def _scale(settings: Settings) -> dict[str, Any]:
    """How many replicas of the engine there are."""
    replicas = settings.replicas
    if replicas.least == replicas.most:
        return {"num_replicas": replicas.least}
    return {
        "autoscaling_config": {
            "min_replicas": replicas.least,
            "max_replicas": replicas.most,
            "target_ongoing_requests": settings.config.max_concurrency,
            "upscale_delay_s": UPSCALE_SECONDS,
            "downscale_delay_s": DOWNSCALE_SECONDS,
        }
    }
