"""LoRA adapters as an engine knows them: their names, and what keeps their cached blocks apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from harmonium.engine.protocol import Request


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """name: what a request calls it. index: its place in the runner. digest: of what it computes with."""

    name: str
    index: int
    digest: str


class AdapterTable:
    """The adapters of an engine by name."""

    def __init__(self, adapters: Iterable[ServedAdapter] = ()) -> None:
        self._by_name: Mapping[str, ServedAdapter] = {adapter.name: adapter for adapter in adapters}

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they were given."""
        return tuple(self._by_name)

    def of(self, request: Request) -> ServedAdapter | None:
        """The adapter that the request asks for, which admission has checked to be there."""
        return None if request.adapter is None else self._by_name[request.adapter]


def cache_key(adapter: ServedAdapter | None, salt: str) -> str:
    """What a prefix must have in common for its blocks to be shared: the adapter, and the request's salt.

    Keys and values depend on the adapter from the first layer on. A digest has no line feed, so no salt,
    which may be any text, makes another adapter's key.
    """
    return f"{'' if adapter is None else adapter.digest}\n{salt}"
