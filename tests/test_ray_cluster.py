"""Replicas on Ray Serve: they answer, die and change under load.

Opt-in: HARMONIUM_TEST_RAY=1 and the extras ray and store (docs/cluster.md).
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from harmonium import ray as replicas
from harmonium.engine.ray_engine import ReplicaLost, Route
from harmonium.errors import EngineBusy
from tests.server.postgres import missing, postgres

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(
    not (HAS_RAY and os.environ.get("HARMONIUM_TEST_RAY")), reason="HARMONIUM_TEST_RAY is not set, or no Ray"
)

ADDRESS = "http://127.0.0.1:8765"
LONG = {"prompt": "In the beginning", "max_tokens": 700, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def store_url() -> Iterator[str]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with postgres() as cluster:
        yield cluster.url


def deploy(store_url: str, **changes: str) -> None:
    import ray
    from ray import serve

    if not ray.is_initialized():
        ray.init(include_dashboard=False, num_cpus=4)
        serve.start(http_options={"host": "127.0.0.1", "port": 8765})
    args = {
        "model": "demo",
        "replicas": "2",
        "threads": "1",
        "context_length": "2048",
        "store_url": store_url,
        **changes,
    }
    serve.run(replicas.app(args), name=replicas.APPLICATION, route_prefix="/")


@pytest.fixture(scope="module")
def cluster(store_url: str) -> Iterator[str]:
    import ray
    from ray import serve

    deploy(store_url)
    yield store_url
    serve.shutdown()
    ray.shutdown()


def replica_processes(deployment: str = "engine") -> list[int]:
    """Of the engine's replicas or the fronts ("server"), by the title that Ray gives their processes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(f"ray::ServeReplica:harmonium:{deployment}".encode()):
            found.append(int(folder.name))
    return found


def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
    body = {"model": "harmonium-demo", **body}
    answer = httpx.post(f"{ADDRESS}/v1/{path}", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def ended(response_id: str) -> dict[str, Any]:
    """A background response when it has ended."""
    deadline = time.monotonic() + 60
    while True:
        response = httpx.get(f"{ADDRESS}/v1/responses/{response_id}", timeout=60).json()
        if response["status"] not in ("queued", "in_progress"):
            assert response["status"] == "completed", response
            return dict(response)
        assert time.monotonic() < deadline, "a background response does not end"
        time.sleep(0.2)


def chat(question: str = "What is 47 + 385?", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], **more}


def streamed(body: dict[str, Any]) -> str:
    """The text of a streamed chat answer."""
    text = ""
    body = {"model": "harmonium-demo", "stream": True, **body}
    with httpx.stream("POST", f"{ADDRESS}/v1/chat/completions", json=body, timeout=120) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    for line in lines[:-1]:
        choices = json.loads(line)["choices"]
        text += "".join(choice["delta"].get("content") or "" for choice in choices)
    return text


class Load:
    """Requests of three kinds, again and again, on threads of their own."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(kind,)) for kind in ("stream", "whole", "text")
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, kind: str) -> None:
        while not self._is_over.is_set():
            try:
                if kind == "stream":
                    assert "432" in streamed(chat(temperature=0))
                elif kind == "whole":
                    answer = ask("responses", {"input": "What is 47 + 385?", "temperature": 0})
                    assert "432" in json.dumps(answer["output"])
                else:
                    # What it writes is random, and may be nothing.
                    answer = ask("completions", {"prompt": "a b c", "max_tokens": 4})
                    assert answer["usage"]["completion_tokens"] >= 1
            except Exception as error:  # counted, and looked at by the test
                self.failures.append(f"{kind}: {error!r}"[:300])
            self.counts[kind] += 1


@needs_ray
def test_two_replicas_answer_a_mixed_load(cluster: str) -> None:
    assert len(replica_processes()) == 2
    with Load() as load:
        time.sleep(5)
    assert not load.failures and min(load.counts.values()) >= 2, load.counts


@needs_ray
def test_a_conversation_goes_on_at_any_replica(cluster: str) -> None:
    response = ask("responses", {"input": "What is 47 + 385?"})
    for _ in range(8):  # one after the other lands at either
        again = ask("responses", {"input": "And 2 + 3?", "previous_response_id": response["id"]})
        assert again["previous_response_id"] == response["id"]
        assert httpx.get(f"{ADDRESS}/v1/responses/{response['id']}", timeout=60).status_code == 200


@needs_ray
def test_a_rolling_update_loses_nothing(cluster: str) -> None:
    before = set(replica_processes())
    with Load() as load:
        time.sleep(1)
        question = {"input": "What is 47 + 385?", "background": True, "temperature": 0}
        begun = [ask("responses", question) for _ in range(6)]
        deploy(cluster, context_length="1024")
        time.sleep(1)
    assert not load.failures, load.failures
    for response in begun:
        assert "432" in json.dumps(ended(response["id"])["output"])
    assert before.isdisjoint(replica_processes())
    listed = httpx.get(f"{ADDRESS}/v1/models", timeout=60).json()["data"]
    assert listed[0]["max_model_len"] == 1024


def wait_for_two(without: int) -> None:
    deadline = time.monotonic() + 120
    while len(set(replica_processes()) - {without}) < 2:
        assert time.monotonic() < deadline, "no replica came in its place"
        time.sleep(0.5)


@needs_ray
def test_nobody_notices_a_replica_that_is_killed_under_load(cluster: str) -> None:
    victim = replica_processes()[0]
    with Load() as load:
        time.sleep(2)
        os.kill(victim, signal.SIGKILL)
        wait_for_two(victim)
        time.sleep(3)
    assert not load.failures, load.failures
    assert min(load.counts.values()) >= 2, load.counts


@needs_ray
def test_a_front_that_is_killed_cuts_its_own_requests_alone(cluster: str) -> None:
    victim = replica_processes("server")[0]
    with Load() as load:
        time.sleep(2)
        os.kill(victim, signal.SIGKILL)
        deadline = time.monotonic() + 120
        while len(set(replica_processes("server")) - {victim}) < 2:
            assert time.monotonic() < deadline, "no front came in its place"
            time.sleep(0.5)
        time.sleep(3)
        num_before = len(load.failures)
        time.sleep(2)
    assert len(load.failures) <= 3, load.failures  # at most what each of the three threads had there
    assert len(load.failures) == num_before  # and nothing once the other has come


@needs_ray
def test_replicas_end_the_answers_of_fronts_that_died(cluster: str) -> None:
    from ray import serve

    handle = serve.get_deployment_handle("engine", replicas.APPLICATION)
    body = {"model": "harmonium-demo", **LONG, "max_tokens": 1900, "n": 12}  # longer than a replica needs

    def aborted() -> int:
        """Of the replica that ended most so; of so many answers both are among them."""
        found = [handle.statistics.remote(Route()).result() for _ in range(16)]
        return max(one.finished.get("aborted", 0) for one in found)

    before = aborted()
    with httpx.stream("POST", f"{ADDRESS}/v1/completions", json=body, timeout=120) as answer:
        lines = answer.iter_lines()
        while not next(lines).startswith("data: {"):
            pass
        victims = replica_processes("server")
        for process in victims:
            os.kill(process, signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            list(lines)
    deadline = time.monotonic() + 60
    while aborted() == before:
        assert time.monotonic() < deadline, "it computes for nobody"
        time.sleep(0.5)
    while len(set(replica_processes("server")) - set(victims)) < 2:
        assert time.monotonic() < deadline, "no front came in their place"
        time.sleep(0.5)
    streamed(chat())


def cpu_ticks(process: int) -> int:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.parametrize("seed", [7, 8])
@needs_ray
def test_a_stream_whose_replica_is_killed_goes_on_with_the_same_text(cluster: str, seed: int) -> None:
    """Drawn: past its end the demo model has pairs of likeliest tokens between which rounding decides."""

    def read(kill_after: int | None) -> tuple[str, int]:
        body = {"model": "harmonium-demo", **LONG, "temperature": 1, "seed": seed}
        text, victim, before = "", 0, {one: cpu_ticks(one) for one in replica_processes()}
        with httpx.stream("POST", f"{ADDRESS}/v1/completions", json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                text += json.loads(line[6:])["choices"][0]["text"]
                if kill_after is not None and len(text) > kill_after:
                    victim, kill_after = max(before, key=lambda one: cpu_ticks(one) - before[one]), None
                    os.kill(victim, signal.SIGKILL)
        return text, victim

    whole, _ = read(None)
    again, victim = read(len(whole) // 4)
    assert victim and again == whole
    wait_for_two(victim)


@needs_ray
def test_a_prompt_goes_where_it_was_computed(cluster: str) -> None:
    """The same long prompts again and again: all but the first answers of each find it in the cache."""
    prompts = [f"{number} " + "a long text of many words " * 60 for number in range(6)]
    cached = []
    for _ in range(3):
        for prompt in prompts:
            usage = ask("completions", {"prompt": prompt, "max_tokens": 2})["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"])
    assert min(cached[len(prompts) :]) > 0.5, cached


@needs_ray
def test_a_client_that_leaves_frees_its_replica(cluster: str) -> None:
    from ray import serve

    handle = serve.get_deployment_handle("engine", replicas.APPLICATION)
    body = {"model": "harmonium-demo", **LONG, "max_tokens": 1900}

    def wait_for(running: int) -> None:
        """Until the busiest replica runs so many; of so many answers both are among them."""
        deadline = time.monotonic() + 60
        while max(handle.statistics.remote(Route()).result().running for _ in range(16)) != running:
            assert time.monotonic() < deadline, f"{running} do not run"

    with httpx.stream("POST", f"{ADDRESS}/v1/completions", json=body, timeout=120) as answer:
        lines = answer.iter_lines()  # a reference: the stream is closed with it
        assert next(lines)
        wait_for(1)
    wait_for(0)
    ended = [handle.statistics.remote(Route()).result().finished.get("aborted", 0) for _ in range(16)]
    assert max(ended) >= 1


@needs_ray
def test_requests_wait_for_the_successor_of_the_only_replica(cluster: str) -> None:
    deploy(cluster, replicas="1")
    (victim,) = replica_processes()
    with Load() as load:
        time.sleep(1)
        os.kill(victim, signal.SIGKILL)
        time.sleep(10)
    assert not load.failures, load.failures
    assert min(load.counts.values()) >= 2, load.counts


def wait_for_replicas(number: int) -> float:
    """Seconds until there are so many."""
    began = time.monotonic()
    while len(replica_processes()) != number:
        assert time.monotonic() - began < 240, f"there are {len(replica_processes())} replicas, not {number}"
        time.sleep(0.5)
    return time.monotonic() - began


@needs_ray
def test_a_second_replica_comes_under_load_and_goes_when_it_is_idle(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "DOWNSCALE_SECONDS", 5.0)
    deploy(cluster, replicas="1:2", max_concurrency="1", max_queue="8")
    wait_for_replicas(1)
    with Load() as load:
        came = wait_for_replicas(2)
        time.sleep(5)
    went = wait_for_replicas(1)
    assert not load.failures, load.failures
    print(f"a second replica came after {came:.0f} s of load and went after {went:.0f} s without")


@needs_ray
def test_what_ray_raises_is_read() -> None:
    from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
    from ray.serve.exceptions import BackPressureError

    from harmonium.engine.ray_router import read_error

    def raised(cause: Exception) -> Exception:
        return read_error(RayTaskError("generate", "traceback", cause).as_instanceof_cause())

    busy = EngineBusy("many wait", 7.0)
    assert raised(busy) is busy
    assert isinstance(raised(ActorDiedError()), ReplicaLost)
    assert str(raised(ZeroDivisionError("x"))) == "the replica failed: ZeroDivisionError: x"
    assert isinstance(read_error(ActorUnavailableError("gone", b"1" * 16)), ReplicaLost)
    assert isinstance(
        read_error(
            BackPressureError(num_queued_requests=1, max_queued_requests=1, status_code=503, retry_after_s=1)
        ),
        EngineBusy,
    )
    error = ValueError("ours")
    assert read_error(error) is error
