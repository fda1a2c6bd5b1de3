"""Replicas on Ray Serve without Ray: what goes with them, and what runs in its processes."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from typing import Any

import pytest

from harmonium import ray as replicas
from harmonium import ray_deployments
from harmonium.engine import ScriptedEngine
from harmonium.engine.ray_engine import Route
from harmonium.errors import ConfigError, EngineBusy, EngineClosed
from harmonium.ray_deployments import EngineReplica

HAS_RAY = importlib.util.find_spec("ray") is not None
STORE = {"store_url": "sqlite:///x.db"}


@pytest.mark.parametrize(("text", "least", "most"), [("1", 1, 1), ("2", 2, 2), ("1:4", 1, 4)])
def test_replicas_are_a_number_or_two(text: str, least: int, most: int) -> None:
    assert replicas.Replicas.parse(text) == replicas.Replicas(least, most)


@pytest.mark.parametrize("text", ["0", "-1", "x", "4:1", "0:2", "1:2:3", "1:", ":"])
def test_other_numbers_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--replicas is"):
        replicas.Replicas.parse(text)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"replicas": "2"}, "more than one replica needs --store-url"),
        ({"replicas": "2", "store": "x.db"}, "--store FILE is one server's"),
        ({"replicas": "2", "engine": "vllm=http://x", **STORE}, "of the native engine"),
        ({"replicas": "2", "port": "0", **STORE}, "--port is 0"),
        (
            {"replicas": "2", "allow_lora_updates": "", **STORE},
            "would change one replica",
        ),
        ({"no_such_option": "1"}, "no-such-option"),
        ({"context_length": "x"}, "context-length"),
    ],
)
def test_what_does_not_go_with_replicas_is_refused(args: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replicas.app({"model": "demo", **args})


def test_options_are_those_of_serve() -> None:
    arguments = replicas.parse({"model": "20b", "replicas": "1:4", "context_length": 4096, "insecure": True})
    assert (arguments.model, arguments.replicas, arguments.context_length) == ("20b", "1:4", 4096)
    assert arguments.insecure and arguments.command == "serve"


def test_threads_are_shared_out() -> None:
    arguments = replicas.parse({"model": "demo", "replicas": "1:2", **STORE})
    settings = replicas._settings(arguments)
    assert settings.model == "demo" and settings.engine_config.threads == max(
        1, len(os.sched_getaffinity(0)) // 2
    )


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1: "),
        ("here", "--ray-address is 'here'; expected HOST:PORT"),
    ],
)
def test_an_address_where_nobody_listens_is_refused_at_once(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replicas._check_reachable(address)


class Unmade(EngineReplica):
    """A replica without what its constructor does."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


class _Stopped:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def admit(self, request: object) -> None:
        raise self.error


def test_a_replica_whose_engine_has_stopped_is_ill() -> None:
    def check(engine: Any) -> None:
        replica = object.__new__(Unmade)
        replica.engine = engine
        replica.check_health()

    check(_Stopped(EngineBusy("many wait")))
    with pytest.raises(EngineClosed):
        check(_Stopped(EngineClosed("the engine has stopped")))


def test_a_front_waits_for_a_replica_of_its_own_settings() -> None:
    """While an update goes on, one with the old context length may answer first."""
    replica = object.__new__(Unmade)
    replica.engine = ScriptedEngine([[1]])  # type: ignore[assignment]
    versions = ["old", "old", "new", "newer"]

    class Handle:
        info: Any

        def remote(self, route: Route) -> Any:
            replica.version = versions.pop(0)
            return replica.info(route)

    handle = Handle()
    handle.info = handle
    assert asyncio.run(ray_deployments._ask_info(handle, "new")) == replica.engine.info
    assert versions == ["newer"]


def test_answers_of_a_front_that_died_are_ended_and_others_go_on() -> None:
    dead: set[str] = set()
    asked: list[str] = []

    async def is_dead(front: str) -> bool:
        asked.append(front)
        return front in dead

    async def answer(watch: ray_deployments.FrontWatch, front: str | None, is_over: asyncio.Event) -> str:
        try:
            with watch.working(front):
                await is_over.wait()
        except asyncio.CancelledError:
            return "cancelled"
        return "ended"

    async def run() -> list[str]:
        watch, is_over = ray_deployments.FrontWatch(is_dead, 0.001), asyncio.Event()
        fronts = ("first", "second", "second", None)
        tasks = [asyncio.create_task(answer(watch, front, is_over)) for front in fronts]
        while set(asked) != {"first", "second"}:
            await asyncio.sleep(0.001)
        dead.add("second")
        await asyncio.wait(tasks[1:3])
        is_over.set()
        found = [await task for task in tasks]
        while watch._watchers:  # nobody is watched who has no answers here
            await asyncio.sleep(0.001)
        assert not watch._answers
        return found

    assert asyncio.run(run()) == ["ended", "cancelled", "cancelled", "ended"]


def test_a_front_takes_what_all_replicas_take() -> None:
    arguments = replicas.parse({"replicas": "1:3", "max_concurrency": 4, "max_queue": 5, **STORE})
    config = replicas._of_all(replicas._settings(arguments).config, 3)
    assert (config.max_concurrency, config.max_queue) == (12, 15)


@pytest.mark.skipif(HAS_RAY, reason="Ray is here")
def test_without_ray_the_extra_is_named() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'harmonium\[ray\]'"):
        replicas.app({"model": "demo"})
