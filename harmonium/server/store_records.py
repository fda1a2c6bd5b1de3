"""What a store of responses keeps, and what it must do, whichever database holds it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from harmonium.errors import ConfigError
from harmonium.server.responses_items import Entry, Item
from harmonium.server.responses_seal import Seal

Json = dict[str, Any]

MAX_RESPONSES = 100_000
MAX_BYTES = 1 << 30

RUNNING = ("queued", "in_progress")
"""Statuses of a response that has not ended."""


@dataclass(frozen=True, slots=True)
class StoredTurn:
    """What a response adds to its conversation. date: as its prompt said it; later turns keep it.

    previous: the response that it continues. items: its input, as the API lists it. entries: input, then
    output. earlier: what had been said before it when it was made.
    """

    previous: str | None
    date: str | None
    items: tuple[Item, ...]
    entries: tuple[Entry, ...]
    earlier: tuple[Entry, ...] = ()

    @property
    def alone(self) -> StoredTurn:
        """The turn where `previous` was deleted while it was made: the conversation is in its own entries."""
        return replace(self, entries=(*self.earlier, *self.entries), earlier=())

    @property
    def item_ids(self) -> tuple[str, ...]:
        """Every id that a later request may refer to, once."""
        return tuple(
            dict.fromkeys([*(item["id"] for item in self.items), *(entry.item_id for entry in self.entries)])
        )


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """A conversation up to and including a response. date: that of its first turn."""

    entries: tuple[Entry, ...] = ()
    date: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a response has come that runs.

    body: the object as it stands; None for one that has ended and is about to say so by `end`. events: all
    so far; the place of each is its sequence number.
    """

    body: Json | None
    events: tuple[Json, ...] = ()


class Store(Protocol):
    """Responses and their conversations. owner: whoever made a response; nobody else can see it.

    A response is stored by `put`: whole, or queued when it runs in the background, which `end` ends. Calls
    block for a few milliseconds and may come from any thread. They raise StoreError when the database fails.
    """

    @property
    def seal(self) -> Seal:
        """Under the key of this store."""
        ...

    def put(self, body: Json, turn: StoredTurn, owner: str = "") -> None:
        """Store a new response with its turn."""
        ...

    def end(self, body: Json, turn: StoredTurn, events: Sequence[Json]) -> bool:
        """Store how a background response ended, with the events of its whole stream.

        False, and nothing is stored, where it was deleted meanwhile or was ended by somebody else.
        """
        ...

    def body(self, response_id: str, owner: str = "") -> Json | None:
        """The response object; None for one that is not stored."""
        ...

    def events(self, response_id: str, owner: str = "", after: int = -1) -> list[Json] | None:
        """The stored events of its stream with a higher sequence number; None where no stream is stored."""
        ...

    def input_items(self, response_id: str, owner: str = "") -> list[Item] | None:
        """The input of its request, oldest first; None for a response that is not stored."""
        ...

    def conversation(self, response_id: str, owner: str = "") -> StoredConversation | None:
        """Everything said up to the end of this response, which counts as used; None if it is not stored."""
        ...

    def find_item(self, item_id: str, owner: str = "") -> tuple[Item, Entry] | None:
        """The newest stored item of this id, and what it means."""
        ...

    def delete(self, response_id: str, owner: str = "") -> bool:
        """Forget a response. Whether there was one."""
        ...

    def close(self) -> None:
        """Let go of the database. A second call does nothing."""
        ...


@runtime_checkable
class SharedStore(Store, Protocol):
    """A store that several servers share: a response may be running in another one of them.

    A response that runs and of which no `beat` has told for some time has failed: its server is gone.
    """

    def check(self) -> None:
        """Raises StoreError while the database is away."""
        ...

    def beat(self, progress: Mapping[str, Progress]) -> set[str]:
        """Tell that these responses, by id, still run here. Returns those that shall not run any more.

        Those were cancelled or deleted through another server, or were given up because no beat came.
        """
        ...

    def request_cancel(self, response_id: str, owner: str = "") -> None:
        """Have the server that makes this response cancel it, at its next beat."""
        ...

    def cancel(self, response_id: str, owner: str = "") -> Json | None:
        """Cancel a response that runs, whatever its server does; the object then, None if not stored."""
        ...


def interrupted(body: Json) -> Json:
    """A response that ran when its server ended, and will not go on."""
    message = "the server ended while this response was being made"
    return {**body, "status": "failed", "error": {"code": "server_error", "message": message}}


def find_stored_item(item_id: str, items: bytes, entries: bytes, body: bytes) -> tuple[Item, Entry] | None:
    """The item of this id in a packed turn or the response that it belongs to, and what it means."""
    listed = [*unpack(items), *unpack(body)["output"]]
    item = next((item for item in listed if item["id"] == item_id), None)
    records = (record for record in unpack(entries) if record["item_id"] == item_id)
    entry = next((Entry.from_json(record) for record in records), None)
    return None if item is None or entry is None else (item, entry)


def check_limits(max_responses: int, max_bytes: int) -> None:
    """Raises ConfigError for limits under which nothing could be kept."""
    if max_responses < 1 or max_bytes < 1:
        raise ConfigError(
            f"max_responses is {max_responses:,} and max_bytes {max_bytes:,}; expected at least 1"
        )


def pack(value: object) -> bytes:
    """Compressed JSON."""
    # ASCII: a lone surrogate, which JSON may hold, has no UTF-8.
    return zlib.compress(json.dumps(value, separators=(",", ":")).encode("ascii"), 1)


def unpack(blob: bytes) -> Any:
    """What `pack` was given; tuples have become lists."""
    return json.loads(zlib.decompress(blob))


@dataclass(frozen=True, slots=True)
class PackedTurn:
    """A turn as it is stored: its input items, and its entries."""

    items: bytes
    entries: bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.items) + len(self.entries)


def pack_turn(turn: StoredTurn) -> PackedTurn:
    """The two columns of a turn."""
    return PackedTurn(pack(turn.items), pack([entry.to_json() for entry in turn.entries]))
