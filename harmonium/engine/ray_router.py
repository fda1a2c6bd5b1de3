"""Which replica on Ray a call goes to, and what Ray's exceptions mean. Imports Ray: needs the extra [ray].

Ray loads `PrefixRouter` in every process that has a handle of the engine deployment, and asks it on a thread
of its own. Source: Ray Serve 2.60's RequestRouter (marked alpha) and its documentation of custom routers.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from random import random
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    OwnerDiedError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskCancelledError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.request_router import RequestRouter

from harmonium.engine.balance import Balancer
from harmonium.engine.ray_engine import ReplicaLost, Route
from harmonium.errors import EngineBusy, EngineError, HarmoniumError, UpstreamUnavailable


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A replica as the Balancer sees it. replica: Ray's RunningReplica."""

    replica: Any
    name: str
    running: int
    rests: bool
    is_up: bool = True


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # without Ray its base is Any
    """Where the prompt's prefix was computed, unless that replica is full, much busier or dead."""

    def initialize_state(self, **settings: Any) -> None:
        """Called by Ray before anything else."""
        self._balancer = Balancer()
        self._num_sent: Counter[Any] = Counter()
        self._dead: set[Any] = set()

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any | None = None
    ) -> list[list[Any]]:
        """Called by Ray, again and again until one of them takes the request: ranks of one replica each."""
        if pending_request is None:
            return [list(candidate_replicas)]
        # Else Ray would ask again at once, for as long as all are full.
        pending_request.routing_context.should_backoff = True
        candidates = [self._candidate(one) for one in candidate_replicas if one.replica_id not in self._dead]
        route = _route_of(pending_request.args)
        untried = [one for one in candidates if one.name not in route.tried] or candidates
        if route.blocks:
            first = self._balancer.choose(untried, route.blocks, ())
        else:
            first = min(untried, key=lambda one: (one.rests, random()), default=None)
        if first is None:
            await asyncio.sleep(0)  # Ray asks again before it waits, and the list may be stale
            return []
        others = [one for one in untried if one is not first]
        return [[one.replica] for one in (first, *sorted(others, key=lambda one: (one.rests, one.running)))]

    def _candidate(self, replica: Any) -> _Candidate:
        """running: what it told lately counts all fronts' requests; what we sent is never out of date."""
        told = self.replica_queue_len_cache.get(replica.replica_id)
        running = max(told or 0, self._num_sent[replica.replica_id])
        is_full = running >= replica.max_ongoing_requests
        return _Candidate(replica, replica.replica_id.unique_id, running, is_full)

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Called by Ray when a replica has taken a request."""
        route = _route_of(pending_request.args)
        route.tried.append(replica_id.unique_id)
        self._balancer.remember(route.blocks, replica_id.unique_id)

    def on_send_request(self, replica_id: Any) -> None:
        """Called by Ray when a request is offered to a replica."""
        super().on_send_request(replica_id)
        self._num_sent[replica_id] += 1

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """Called by Ray when a replica refused a request or is done with it."""
        super().on_request_completed(replica_id, internal_request_id)
        self._num_sent[replica_id] = max(0, self._num_sent[replica_id] - 1)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """Called by Ray when a call told it so. The controller may list that replica for a while yet."""
        super().on_replica_actor_died(replica_id)
        self._dead.add(replica_id)

    def update_replicas(self, replicas: list[Any]) -> None:
        """Called by Ray with the replicas that there are."""
        super().update_replicas(replicas)
        there = {one.replica_id for one in replicas}
        self._dead &= there
        self._num_sent = Counter({one: num for one, num in self._num_sent.items() if one in there})


def _route_of(arguments: list[Any]) -> Route:
    return next((argument for argument in arguments if isinstance(argument, Route)), Route())


def read_error(error: Exception) -> Exception:
    """What an exception of a call means to us: what the replica raised, or ReplicaLost, or that nobody is
    there. What is none of Ray's is given back.
    """
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, HarmoniumError):
            return cause
        if isinstance(cause, RayError):
            return read_error(cause)
        return EngineError(f"the replica failed: {type(cause).__name__}: {cause}")
    if isinstance(error, (RayActorError, OwnerDiedError, TaskCancelledError)):
        return ReplicaLost("the replica that computed this died")
    if isinstance(error, BackPressureError):
        return EngineBusy("too many requests wait for a replica")
    if isinstance(error, DeploymentUnavailableError):
        return UpstreamUnavailable("no replica of the model can be started; see the logs of Ray Serve")
    if isinstance(error, (RayError, RayServeException)):
        return EngineError(f"Ray failed: {type(error).__name__}")
    return error


def this_process() -> Any:
    """Ray's handle of the actor that runs here, by which others may see whether it lives."""
    return ray.get_runtime_context().current_actor


async def is_dead(actor: Any) -> bool:
    """Whether Ray is sure of it: one that cannot be reached now may come back."""
    try:
        await actor.__ray_ready__.remote()
    except ActorDiedError:
        return True
    except RayError:
        return False
    return False
