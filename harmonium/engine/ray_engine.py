"""RayEngine: the Engine seam over replicas of our own engine that Ray Serve runs.

    engine = RayEngine(handle, info, read_error)

The replicas compute; everything else stays in the process of the front. An answer whose replica dies goes on
at another one behind the tokens that are here (`Request.answer_token_ids`). Which replica gets a request is
decided by engine/ray_router.py. This module imports no Ray, so that it can be tested without.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from harmonium.engine.admission import check_request
from harmonium.engine.balance import prefix_hashes
from harmonium.engine.guided import MAX_RESUMED
from harmonium.engine.protocol import EngineInfo, Request, Token, TokenEvent
from harmonium.engine.remote import RemoteStatistics
from harmonium.errors import EngineClosed, EngineError, RequestError, UpstreamUnavailable

_log = logging.getLogger("harmonium.engine")

MAX_RETRIED = 2
"""How often a request that has no token yet goes elsewhere. More would let one that kills its replica kill
them all.
"""

T = TypeVar("T")


class ReplicaLost(UpstreamUnavailable):
    """The replica that worked for us is gone, or is going; another may do."""


class Route:
    """Where a call went, and what decides where it goes. Of what it has only `front` arrives with the call.

    blocks: `prefix_hashes` of its prompt, (): any replica does. front: whose death ends the call; None:
    nobody's. tried: names of the replicas that had it; the router, on its own thread, adds to them.
    """

    def __init__(self, blocks: tuple[bytes, ...] = (), front: Any = None) -> None:
        self.blocks = blocks
        self.front = front
        self.tried: list[str] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Route, ((), self.front)


class Handle(Protocol):
    """What is used of Ray's DeploymentHandle."""

    def options(self, *, method_name: str, stream: bool) -> Any:
        """The handle of a method; its `remote(...)` begins a call at once and returns a response.

        A response is awaited, or an async iterator where stream is true; it has `cancel()`.
        """
        ...


class RayEngine:
    """Serves requests from one event loop by asking replicas. Closes no replica.

    A replica has `generate(request, route)`, whose events tell `began` as seconds before they were sent, and
    `score(token_ids, num_top, adapter, route)`.
    """

    def __init__(
        self,
        handle: Handle,
        info: EngineInfo,
        read_error: Callable[[Exception], Exception],
        front: Any = None,
    ) -> None:
        """read_error: what an exception of Ray's means: ReplicaLost, or what the replica raised. front: Ray's
        handle of this process, by which replicas see that it lives.
        """
        self._handle = handle
        self._front = front
        self._info = replace(info, engine="ray")
        self._read_error = read_error
        self._is_closed = False
        self._waiting: set[asyncio.Task[Any]] = set()
        self._num_retried = self._num_resumed = 0

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def statistics(self) -> RemoteStatistics:
        """How often requests and answers went elsewhere. The replicas' own counts are not gathered."""
        return RemoteStatistics(self._num_retried, self._num_resumed)

    def admit(self, request: Request) -> None:
        """Check that the request can be served. Raises PromptTooLong, RequestError, EngineClosed."""
        check_request(request, self._info)
        if self._is_closed:
            raise EngineClosed("the engine is closed")

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Continue a sequence: events until one has a finish_reason. Closing the generator frees the replica.

        Where the replica goes before the first token another is asked, MAX_RETRIED times; after it the answer
        goes on at another one, MAX_RESUMED times, and then ends with "error". Raises what `admit` raises and
        what replicas raise (EngineBusy, EngineError); UpstreamUnavailable where none could begin.
        """
        self.admit(request)
        request = _with_seed(request)
        salt = f"{request.adapter}/{request.cache_salt}"
        route = Route(tuple(prefix_hashes(request.token_ids, salt)), self._front)
        came: list[int] = []
        num_cached: int | None = None
        num_retried = num_resumed = 0
        while True:
            begun = replace(request, answer_token_ids=(*request.answer_token_ids, *came))
            try:
                async with aclosing(self._events(begun, route)) as events:
                    async for event in events:
                        num_cached = event.num_cached_tokens if num_cached is None else num_cached
                        came += [token.token_id for token in event.tokens]
                        yield replace(event, num_cached_tokens=num_cached)
                return
            except (ReplicaLost, RequestError) as error:
                # It was admitted here: a replica that refuses it has other settings, and will be replaced.
                if self._is_closed:
                    yield TokenEvent((), "aborted", num_cached or 0)
                    return
                if came and num_resumed >= MAX_RESUMED:
                    yield TokenEvent((), "error", num_cached or 0, str(error))
                    return
                if not came and num_retried >= MAX_RETRIED:
                    raise
                num_resumed += bool(came)
                num_retried += not came
                self._note(error, request.request_id, route, len(came))

    def _note(
        self, error: EngineError | RequestError, request_id: str, route: Route, num_tokens: int
    ) -> None:
        self._num_retried += not num_tokens
        self._num_resumed += bool(num_tokens)
        where = route.tried[-1] if route.tried else "a replica"
        _log.warning("%s: %s; %s goes on elsewhere behind %d tokens", where, error, request_id, num_tokens)

    async def _events(self, request: Request, route: Route) -> AsyncGenerator[TokenEvent, None]:
        """The events of one replica. One that ends what we did not is lost: it shuts down."""
        response = self._begin("generate", True, request, route)
        is_over = False
        try:
            while not is_over:
                event: TokenEvent = await self._wait(anext, response)
                if event.finish_reason == "aborted":
                    raise ReplicaLost("the replica was shut down")
                if event.began is not None:
                    event = replace(event, began=time.monotonic() + event.began)
                is_over = event.finish_reason is not None
                yield event
        finally:
            if not is_over:
                response.cancel()

    def _begin(self, method: str, is_stream: bool, *arguments: Any) -> Any:
        """Call a replica. Ray ties a call to the HTTP request whose context it is made in, and cuts it with
        that; ours end when their generators are closed, also where a response is made in the background.
        """
        remote = self._handle.options(method_name=method, stream=is_stream).remote
        return contextvars.Context().run(remote, *arguments)

    async def _wait(self, ask: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """What Ray gives. Raises what it means.

        A task of its own tells our cancellation from a replica's: Ray raises CancelledError for both.
        """
        task = asyncio.ensure_future(_value(ask, *arguments))
        task.add_done_callback(_look_at)
        self._waiting.add(task)
        try:
            if self._is_closed:  # nobody would cancel it
                raise ReplicaLost("the engine is closed")
            await asyncio.wait([task])
        finally:
            task.cancel()
            self._waiting.discard(task)
        if task.cancelled():
            raise ReplicaLost("the replica was shut down")
        try:
            return task.result()
        except StopAsyncIteration:
            raise ReplicaLost("the replica ended its answer without a reason") from None
        except Exception as error:
            raise self._read_error(error) from None

    async def score(
        self, token_ids: tuple[int, ...], num_top: int, adapter: str | None = None
    ) -> tuple[Token, ...]:
        """As PromptScorer says. Raises what `generate` raises."""
        self.admit(Request("score", token_ids, adapter=adapter))
        route = Route(tuple(prefix_hashes(token_ids, f"{adapter}/")))
        for _ in range(MAX_RETRIED):
            response = self._begin("score", False, token_ids, num_top, adapter, route)
            try:
                scores: tuple[Token, ...] = await self._wait(_itself, response)
                return scores
            except ReplicaLost as error:
                if self._is_closed:
                    raise EngineClosed("the engine is closed") from None
                self._note(error, "score", route, 0)
            finally:
                response.cancel()
        raise UpstreamUnavailable("the replicas that computed this died")

    async def close(self) -> None:
        """End running requests with "aborted". A second call does nothing."""
        self._is_closed = True
        for task in list(self._waiting):
            task.cancel()


async def _value(ask: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    return await ask(*arguments)


def _look_at(task: asyncio.Task[Any]) -> None:
    """Else asyncio tells of what a call that we left raised later."""
    if not task.cancelled():
        task.exception()


def _itself(response: Any) -> Any:
    return response


def _with_seed(request: Request) -> Request:
    """The request with a seed, so that another replica goes on with the same draws."""
    if request.sampling.seed is not None:
        return request
    return replace(request, sampling=replace(request.sampling, seed=secrets.randbits(64)))
