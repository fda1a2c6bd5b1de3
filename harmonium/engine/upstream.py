"""One server that computes for us: how it stands, what it was asked, and a question to it."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from harmonium.engine.http_exchange import (
    Address,
    EventLines,
    Exchange,
    ExchangeError,
    ExchangeTimeout,
    closing,
    open_exchange,
)
from harmonium.engine.protocol import Token
from harmonium.engine.vllm_wire import (
    Call,
    Chunk,
    ModelCard,
    RefusedError,
    read_chunk,
    read_models,
    read_scores,
    refused,
    score_body,
)
from harmonium.errors import UpstreamError

_log = logging.getLogger("harmonium.engine")

_MAX_SCORES_BYTES = 512 << 20
_MAX_ERROR_BYTES = 1 << 20
_ID_LETTERS = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True, slots=True)
class RemoteSettings:
    """How upstreams are used. Times in seconds.

    connect_seconds: until a connection stands. first_token_seconds: from there to the first token (queue and
    prompt). token_seconds: between tokens after it. check_seconds: between two looks at an upstream's health.
    start_seconds: how long to wait for the first upstream. rest_seconds: how long one that said it is full
    is passed over while there are others. max_corrections: how often an answer that leaves its grammar is
    put right by another request; 0: it ends with an error. api_key: sent as a bearer token.
    """

    connect_seconds: float = 5.0
    first_token_seconds: float = 600.0
    token_seconds: float = 120.0
    check_seconds: float = 2.0
    start_seconds: float = 1800.0
    rest_seconds: float = 1.0
    max_corrections: int = 1000
    api_key: str = ""


@dataclass(frozen=True, slots=True)
class UpstreamStatistics:
    """What one upstream did so far. failures: requests that it broke; ejections: times it was found down."""

    url: str
    is_up: bool
    running: int
    requests: int
    failures: int
    ejections: int


class BrokenError(Exception):
    """An upstream cannot be reached, went away or failed; another may do better. is_down: it is not there."""

    def __init__(self, message: str, is_down: bool) -> None:
        super().__init__(message)
        self.is_down = is_down


@dataclass(eq=False, slots=True)
class Upstream:
    """One server. is_up: whether requests go to it. running: requests that it works on for us.

    why_down: what was last wrong with it, "" while nothing is.
    """

    address: Address
    settings: RemoteSettings = field(default_factory=RemoteSettings)
    is_up: bool = False
    running: int = 0
    requests: int = 0
    failures: int = 0
    ejections: int = 0
    why_down: str = "not asked yet"
    _rests_until: float = 0.0
    _exchanges: set[Exchange] = field(default_factory=set)

    @property
    def name(self) -> str:
        """Its address, by which a Balancer knows it."""
        return self.address.text

    @property
    def rests(self) -> bool:
        """Whether it said lately that it has no room."""
        return time.monotonic() < self._rests_until

    def rest(self, seconds: float) -> None:
        """Pass it over for so long, where there are others."""
        self._rests_until = time.monotonic() + seconds

    def eject(self, why: str) -> None:
        """Send it nothing more until a look at its health finds it well; what runs on it goes on."""
        if self.is_up:
            self.ejections += 1
            _log.warning("%s is taken out: %s", self.address.text, why)
        self.is_up, self.why_down = False, why

    def admit(self) -> None:
        """It is well: send it requests."""
        if not self.is_up:
            _log.info("%s serves", self.address.text)
        self.is_up, self.why_down = True, ""

    @property
    def statistics(self) -> UpstreamStatistics:
        return UpstreamStatistics(
            self.address.text, self.is_up, self.running, self.requests, self.failures, self.ejections
        )

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count a request while it runs."""
        self.running += 1
        self.requests += 1
        try:
            yield
        finally:
            self.running -= 1

    def cut_off(self) -> None:
        """Close the connections of everything that runs. From any thread."""
        for exchange in list(self._exchanges):
            exchange.close()

    async def is_healthy(self) -> bool:
        """Whether its /health says 200. Raises BrokenError when it cannot be asked."""
        status, _ = await self._get("/health")
        return status == 200

    async def models(self) -> tuple[ModelCard, ...]:
        """What it serves. Raises BrokenError, RefusedError, UpstreamError."""
        status, body = await self._get("/v1/models")
        if status != 200:
            raise refused(status, body)
        return read_models(body)

    async def _get(self, path: str) -> tuple[int, bytes]:
        seconds = self.settings.connect_seconds
        try:
            async with closing(await self._open("GET", path, b"", {}, seconds)) as exchange:
                return exchange.status, await exchange.body(seconds, _MAX_ERROR_BYTES)
        except ExchangeTimeout:
            raise BrokenError(f"no answer to {path} within {seconds:g} s", is_down=True) from None
        except ExchangeError as error:
            raise BrokenError(str(error), is_down=True) from None

    async def _open(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], head_seconds: float
    ) -> Exchange:
        sent = dict(headers)
        if self.settings.api_key:
            sent["authorization"] = f"Bearer {self.settings.api_key}"
        return await open_exchange(
            self.address,
            method,
            path,
            sent,
            body,
            register=self._exchanges,
            connect_seconds=self.settings.connect_seconds,
            head_seconds=head_seconds,
        )

    async def ask(self, call: Call, vocabulary_size: int) -> AsyncGenerator[Chunk, None]:
        """vLLM's answer, chunk by chunk; the last one has a finish_reason. Closing the generator aborts it.

        Raises RefusedError, BrokenError, UpstreamError.
        """
        try:
            async with closing(await self._send(call)) as exchange:
                async for chunk in self._chunks(exchange, call, vocabulary_size):
                    yield chunk
        except ExchangeError as error:
            raise BrokenError(str(error), is_down=False) from None
        except ExchangeTimeout:
            raise UpstreamError("vLLM wrote no token for too long") from None

    async def _send(self, call: Call) -> Exchange:
        """The answer's head, which must be a 200. A connection that cannot be made says that it is down."""
        headers = {"x-request-id": _ID_LETTERS.sub("_", call.request_id)[:200], "accept": "text/event-stream"}
        try:
            exchange = await self._open(
                "POST", "/v1/completions", call.body(), headers, self.settings.first_token_seconds
            )
        except ExchangeError as error:
            raise BrokenError(str(error), is_down=True) from None
        if exchange.status == 200:
            return exchange
        async with closing(exchange):
            body = await exchange.body(self.settings.connect_seconds, _MAX_ERROR_BYTES)
            raise refused(exchange.status, body, exchange.headers.get("retry-after"))

    async def _chunks(
        self, exchange: Exchange, call: Call, vocabulary_size: int
    ) -> AsyncGenerator[Chunk, None]:
        """Tokens as they come; what ends the answer waits for the usage that vLLM sends behind it."""
        lines, num_top = EventLines(exchange), call.sampling.logprobs
        now = asyncio.get_running_loop().time
        end = now() + self.settings.first_token_seconds
        last: Chunk | None = None
        num_tokens = 0
        while True:
            try:
                data = await lines.next(end - now())
            except (ExchangeError, ExchangeTimeout):
                if last is None:
                    raise
                break  # the answer is whole; what is missing is its usage
            if data is None or data == b"[DONE]":
                break
            chunk = read_chunk(data, num_top, vocabulary_size)
            num_tokens += len(chunk.tokens)
            if num_tokens > call.max_tokens or (last is not None and chunk.tokens):
                raise UpstreamError("vLLM wrote more tokens than it was asked for")
            if chunk.tokens or chunk.finish_reason is not None:
                end = now() + self.settings.token_seconds
            if chunk.finish_reason is not None:
                last = chunk
            elif last is not None:
                last = Chunk(last.tokens, last.finish_reason, _known(chunk.num_cached, last.num_cached))
            elif chunk.tokens:
                yield chunk
        if last is None:
            raise ExchangeError("the answer ended without a finish_reason")
        yield last

    async def score(self, model: str, token_ids: tuple[int, ...], num_top: int) -> tuple[Token, ...]:
        """Log-probabilities of a prompt's own tokens. Raises RefusedError, BrokenError, UpstreamError."""
        seconds = self.settings.first_token_seconds
        body = score_body(model, token_ids, num_top)
        try:
            async with closing(await self._open("POST", "/v1/completions", body, {}, seconds)) as exchange:
                answer = await exchange.body(seconds, _MAX_SCORES_BYTES)
        except ExchangeError as error:
            raise BrokenError(str(error), is_down=False) from None
        except ExchangeTimeout:
            raise UpstreamError("vLLM gave no log-probabilities in time") from None
        if exchange.status != 200:
            raise refused(exchange.status, answer, exchange.headers.get("retry-after"))
        return await asyncio.to_thread(read_scores, answer, token_ids, num_top)


def _known(first: int | None, second: int | None) -> int | None:
    return first if first is not None else second


def is_worth_another(error: RefusedError) -> bool:
    """Whether another upstream may take what this one refused."""
    return error.status >= 500 or error.status in (404, 429)
