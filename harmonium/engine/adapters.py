"""LoRA adapters as an engine knows them: their names, who uses them, and what keeps their blocks apart."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from harmonium.config import MAX_ADAPTERS
from harmonium.errors import ConfigError, RequestError


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """name: what a request calls it. index: its place in the runner. digest: of what it computes with.

    nbytes: what it takes in memory. max_rank: the largest rank of its products.
    """

    name: str
    index: int
    digest: str
    nbytes: int = 0
    max_rank: int = 0


class AdapterTable:
    """The adapters of an engine by name. Several threads may use it at once."""

    def __init__(self, adapters: Iterable[ServedAdapter] = ()) -> None:
        self._lock = threading.Lock()
        self._by_name = {adapter.name: adapter for adapter in adapters}
        self._begun: Counter[int] = Counter()
        self._retired: dict[int, ServedAdapter] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Those that a request may ask for, in the order in which they came."""
        with self._lock:
            return tuple(self._by_name)

    @property
    def held(self) -> list[ServedAdapter]:
        """All that the runner holds, those included that were removed and are still in use."""
        with self._lock:
            return [*self._by_name.values(), *self._retired.values()]

    @contextmanager
    def using(self, name: str | None) -> Iterator[ServedAdapter | None]:
        """The adapter of a request, which stays until the worker has its sequence. Raises RequestError."""
        if name is None:
            yield None
            return
        with self._lock:
            adapter = self._by_name.get(name)
            if adapter is None:
                raise RequestError(f"there is no adapter {name[:200]!r} any more")
            self._begun[adapter.index] += 1
        try:
            yield adapter
        finally:
            with self._lock:
                self._begun[adapter.index] -= 1

    def free_index(self, name: str) -> int:
        """A place in the runner for a new adapter. Raises ConfigError where name or places are taken."""
        with self._lock:
            if name in self._by_name:
                raise ConfigError(f"there is an adapter {name!r} already; remove it first")
            taken = {adapter.index for adapter in (*self._by_name.values(), *self._retired.values())}
        index = next(index for index in range(len(taken) + 1) if index not in taken)
        if index >= MAX_ADAPTERS:
            raise ConfigError(f"there are {len(taken)} adapters; expected at most {MAX_ADAPTERS}")
        return index

    def add(self, adapter: ServedAdapter) -> None:
        """From now on requests may ask for it."""
        with self._lock:
            self._by_name[adapter.name] = adapter

    def retire(self, name: str) -> ServedAdapter:
        """No new request may ask for it; those that use it go on. Raises RequestError: it is not there."""
        with self._lock:
            adapter = self._by_name.pop(name, None)
            if adapter is None:
                raise RequestError(f"there is no adapter {name[:200]!r}")
            self._retired[adapter.index] = adapter
            return adapter

    def is_awaited(self, adapter: ServedAdapter) -> bool:
        """Whether a sequence that uses it is about to reach the worker."""
        with self._lock:
            return self._begun[adapter.index] > 0

    def forget(self, adapter: ServedAdapter) -> None:
        """The runner has given a retired adapter back: its place is free."""
        with self._lock:
            del self._retired[adapter.index]


def cache_key(adapter: ServedAdapter | None, salt: str) -> str:
    """What a prefix must have in common for its blocks to be shared: the adapter, and the request's salt.

    Keys and values depend on the adapter from the first layer on. A digest has no line feed, so no salt,
    which may be any text, makes another adapter's key.
    """
    return f"{'' if adapter is None else adapter.digest}\n{salt}"
