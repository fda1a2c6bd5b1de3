"""What all requests share: the engine and how it stands, the slots for answers, the counts."""

from __future__ import annotations

import datetime
import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from starlette.datastructures import Headers
from starlette.requests import Request

from harmonium.engine.protocol import Engine
from harmonium.errors import ApiError
from harmonium.server.config import ServerConfig
from harmonium.server.errors import busy
from harmonium.server.keys import key_of
from harmonium.server.metrics import Metrics
from harmonium.server.tracing import Tracing

Status = Literal["loading", "ready", "draining", "failed"]


class ServerState:
    """One server. Without an engine it is "loading": it answers, but serves nothing yet.

    tracing: where spans go, None: nowhere.
    """

    def __init__(self, config: ServerConfig | None = None, engine: Engine | None = None) -> None:
        self.config = config or ServerConfig()
        self.created = int(time.time())
        self.metrics = Metrics(self)
        self.tracing: Tracing | None = None
        self.loaded_fraction = 0.0
        self._engine = engine
        self._is_draining = False
        self._failure: str | None = None
        self._num_held = 0
        self._held_adapters: Counter[str] = Counter()

    def set_engine(self, engine: Engine) -> None:
        """The model is loaded."""
        self._engine = engine
        self.loaded_fraction = 1.0

    def fail(self, reason: str) -> None:
        """The model cannot be loaded."""
        self._failure = reason

    def drain(self) -> None:
        """From now on new requests are refused; those that run go on."""
        self._is_draining = True

    @property
    def status(self) -> Status:
        """As /health says it."""
        if self._is_draining:
            return "draining"
        if self._failure is not None:
            return "failed"
        return "ready" if self._engine is not None else "loading"

    @property
    def engine(self) -> Engine:
        """The engine, for a new request. Raises ApiError (503) while there is none or the server drains."""
        if self._engine is None or self._is_draining:
            raise self._unavailable()
        return self._engine

    @property
    def loaded_engine(self) -> Engine | None:
        """The engine if there is one, also while the server drains."""
        return self._engine

    def _unavailable(self) -> ApiError:
        why = {"loading": "the model is still loading", "draining": "the server is shutting down"}
        message = why.get(self.status, f"the model could not be loaded: {self._failure}")
        return ApiError(
            message, status=503, type="server_error", code=f"server_{self.status}", retry_after_seconds=5
        )

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names of the model itself; the first is what answers say. () while nothing is loaded."""
        if self.config.model_names:
            return self.config.model_names
        return (self._engine.info.model_name,) if self._engine is not None else ()

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names of LoRA adapters, which a request may give as its model too. () while nothing is loaded."""
        return self._engine.info.adapters if self._engine is not None else ()

    def check_model(self, name: str | None) -> str:
        """The name that answers say. None and "" take the model that is served.

        Raises ApiError: 404 for another model's name, 503 while there is no model.
        """
        names = self.model_names or (self.engine.info.model_name,)
        if not name:
            return names[0]
        if name in names:
            return name
        if self._engine is None:
            raise self._unavailable()  # it may be an adapter's name
        if name in self.adapter_names:
            return name
        names = (*names, *self.adapter_names)
        raise ApiError(
            f"model {name[:200]!r} is not served here; there is {', '.join(names)}",
            status=404,
            type="invalid_request_error",
            param="model",
            code="model_not_found",
        )

    def adapter_of(self, model: str | None) -> str | None:
        """The LoRA adapter that a request's model names; None for the model itself."""
        return model if model in self.adapter_names else None

    def owner_of(self, headers: Headers) -> str:
        """Who asks: a digest of the API key that was accepted; "" on a server without keys.

        Owners share neither responses nor cached prefixes, whose timing would tell what others asked.
        """
        if not self.config.api_keys:
            return ""
        return hashlib.sha256((key_of(headers) or "").encode("utf-8", "surrogateescape")).hexdigest()

    @property
    def today(self) -> str:
        """The date that the model is told: pinned by the config, else today in UTC."""
        return self.config.current_date or datetime.datetime.now(datetime.timezone.utc).date().isoformat()

    @property
    def num_held(self) -> int:
        """Answers that hold a slot, running or waiting."""
        return self._num_held

    @property
    def num_running(self) -> int:
        """Answers that hold a slot and, as far as we know, run."""
        return min(self._num_held, self.config.max_concurrency)

    @property
    def num_waiting(self) -> int:
        """Answers beyond max_concurrency: the engine lets them wait."""
        return max(0, self._num_held - self.config.max_concurrency)

    @property
    def held_adapters(self) -> tuple[str, ...]:
        """LoRA adapters of the answers that hold a slot."""
        return tuple(sorted(self._held_adapters))

    @contextmanager
    def hold(self, adapter: str | None = None) -> Iterator[None]:
        """A slot for an answer, given back on leaving. Raises ApiError (429, 503) before anything runs.

        The engine is the server's alone, so whoever holds a slot does not meet EngineBusy later.
        """
        _ = self.engine
        most = self.config.max_concurrency + self.config.max_queue
        if self._num_held + 1 > most:
            self.metrics.refused.inc()
            raise busy(f"{self._num_held:,} answers run or wait and the limit is {most:,}", 1.0)
        self._num_held += 1
        if adapter is not None:
            self._held_adapters[adapter] += 1
            self.metrics.adapter_requests.labels(adapter).inc()
        try:
            yield
        finally:
            self._num_held -= 1
            if adapter is not None:
                self._held_adapters[adapter] -= 1
                self._held_adapters += Counter()  # drops those at 0


def cache_salt(owner: str, asked: str | None) -> str:
    """What keeps cached prefixes apart: who asks, and the salt that the request gives."""
    return "/".join(part for part in (owner, asked) if part)


def state_of(request: Request) -> ServerState:
    """The state of the server that got this request."""
    state = request.app.state.harmonium
    assert isinstance(state, ServerState)
    return state
