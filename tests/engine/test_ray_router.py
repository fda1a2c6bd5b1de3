"""Which replica Ray is told to ask. Needs Ray, but no cluster."""

from __future__ import annotations

import asyncio
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

from harmonium.engine.balance import prefix_hashes
from harmonium.engine.ray_engine import Route
from tests.engine.serving import prompt_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not here")

MOST = 4


class Router:
    """Ours, over replicas that are not there. told: what each last said of its requests."""

    def __init__(self, number: int) -> None:
        from harmonium.engine.ray_router import PrefixRouter

        self.told: dict[Any, int] = {}
        self.ids = [SimpleName(f"replica-{i}") for i in range(number)]
        self.router = object.__new__(PrefixRouter)
        self.router.initialize_state()
        self.router._replica_queue_len_cache = SimpleNamespace(get=self.told.get)
        self.router._replicas = {}
        self.router._replica_id_set = set()
        self.router._queue_len_gauge_last_update = {}

    def ranks(self, route: Route) -> list[str]:
        """The names of the replicas, in the order in which Ray asks them."""
        there = [SimpleNamespace(replica_id=one, max_ongoing_requests=MOST) for one in self.ids]
        pending = SimpleNamespace(args=["a request", route], routing_context=SimpleNamespace())
        ranks = asyncio.run(self.router.choose_replicas(there, pending))
        assert pending.routing_context.should_backoff is True
        assert all(len(rank) == 1 for rank in ranks)
        return [rank[0].replica_id.unique_id for rank in ranks]


class SimpleName:
    """Ray's ReplicaID, as far as it is used."""

    def __init__(self, name: str) -> None:
        self.unique_id = name


def route(seed: int, salt: str = "") -> Route:
    return Route(tuple(prefix_hashes(prompt_of(500, seed), salt)))


def test_a_prompt_goes_to_one_replica_and_the_others_come_after_it() -> None:
    router = Router(4)
    for seed in range(20):
        ranks = [router.ranks(route(seed)) for _ in range(3)]
        assert len({rank[0] for rank in ranks}) == 1
        assert all(sorted(rank) == [one.unique_id for one in router.ids] for rank in ranks)
    assert len({router.ranks(route(seed))[0] for seed in range(20)}) > 1


def test_a_full_replica_is_passed_over_while_others_have_room() -> None:
    router = Router(3)
    wanted = router.ranks(route(1))[0]
    busy = next(one for one in router.ids if one.unique_id == wanted)
    router.told[busy] = MOST
    other = router.ranks(route(1))
    assert other[0] != wanted and other[-1] == wanted
    for one in router.ids:
        router.told[one] = MOST
    assert len(router.ranks(route(1))) == 3  # all are full: any may have room when it is asked


def test_what_was_sent_counts_before_a_replica_tells_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.request_router import RequestRouter

    monkeypatch.setattr(RequestRouter, "on_send_request", lambda *_: None)
    monkeypatch.setattr(RequestRouter, "on_request_completed", lambda *_: None)
    router = Router(2)
    first = router.ranks(route(3))[0]
    one = next(one for one in router.ids if one.unique_id == first)
    for _ in range(MOST):
        router.router.on_send_request(one)
    assert router.ranks(route(3))[0] != first
    for _ in range(MOST + 1):
        router.router.on_request_completed(one, "id")
    assert router.ranks(route(4, "a salt")) and router.router._num_sent[one] == 0


def test_a_replica_that_died_or_was_tried_is_not_asked_again() -> None:
    router = Router(3)
    wanted = router.ranks(route(5))[0]
    dead = next(one for one in router.ids if one.unique_id == wanted)
    router.router.on_replica_actor_died(dead)
    assert wanted not in router.ranks(route(5))  # though the controller still lists it
    again = route(5)
    pending = SimpleNamespace(args=["a request", again])
    second = next(one for one in router.ids if one is not dead)
    router.router.on_request_routed(pending, second, None)
    assert again.tried == [second.unique_id]
    assert router.ranks(again) == [one.unique_id for one in router.ids if one not in (dead, second)]
    third = next(one for one in router.ids if one not in (dead, second))
    router.router.on_request_routed(pending, third, None)
    assert set(router.ranks(again)) == {second.unique_id, third.unique_id}  # rather than nobody
    router.router.on_replica_actor_died(second)
    router.router.on_replica_actor_died(third)
    assert router.ranks(again) == []


def test_calls_without_a_prompt_go_to_any_that_has_room() -> None:
    router = Router(3)
    router.told[router.ids[0]] = MOST
    router.told[router.ids[1]] = MOST - 1
    firsts = {router.ranks(Route())[0] for _ in range(100)}
    assert firsts == {router.ids[1].unique_id, router.ids[2].unique_id}


def test_where_ray_put_a_prompt_it_is_looked_for() -> None:
    router = Router(4)
    for seed in range(8):
        one = router.ids[seed % 4]
        router.router.on_request_routed(SimpleNamespace(args=["a request", route(seed)]), one, None)
        assert router.ranks(route(seed))[0] == one.unique_id
