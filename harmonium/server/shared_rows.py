"""Rows of a shared store: how ids are written, conversations followed, and what nothing needs is removed.

Functions that take a connection work inside the caller's transaction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, delete, exists, func, insert, literal, select

from harmonium.server.shared_tables import events, items, responses, turns
from harmonium.server.store_records import Json, pack

_KEY_CHARS = 512
"""An index of PostgreSQL takes 2,704 bytes."""


def key_text(given: str) -> str:
    """An id as every database takes it: clients may give any, PostgreSQL has no NUL and no surrogates."""
    plain = given.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    if len(plain) <= _KEY_CHARS:
        return plain
    return f"sha256:{hashlib.sha256(plain.encode()).hexdigest()}"


def has_id(response_id: str) -> Any:
    """The condition that a row of `responses` is this one."""
    return responses.c.response_id == key_text(response_id)


def owned(response_id: str, owner: str) -> tuple[Any, Any]:
    """The conditions that a row of `responses` is this one, and this owner's."""
    return has_id(response_id), responses.c.owner == owner


def turn_of(connection: Connection, response_id: str | None, owner: str) -> int | None:
    """The turn of a response; None for one that is not this owner's."""
    if response_id is None:
        return None
    found = connection.scalar(select(responses.c.turn_id).where(*owned(response_id, owner)))
    return None if found is None else int(found)


def chain_of(turn_id: int) -> Any:
    """The query of all turns from the first one to this: date, entries."""
    columns = (turns.c.turn_id, turns.c.parent, turns.c.date, turns.c.entries)
    chain = (
        select(*columns, literal(0).label("depth"))
        .where(turns.c.turn_id == turn_id)
        .cte("chain", recursive=True)
    )
    parents = select(*columns, (chain.c.depth + 1).label("depth")).join(
        chain, turns.c.turn_id == chain.c.parent
    )
    whole = chain.union_all(parents)
    return select(whole.c.date, whole.c.entries).order_by(whole.c.depth.desc())


def add_ids(connection: Connection, turn_id: int, item_ids: Sequence[str]) -> None:
    """Let these items be found."""
    keys = dict.fromkeys(map(key_text, item_ids))
    if keys:
        connection.execute(insert(items), [{"item_id": key, "turn_id": turn_id} for key in keys])


def next_number(connection: Connection, response_id: str) -> int:
    """The sequence number of the first event that is not stored."""
    last = select(func.max(events.c.last_number)).where(events.c.response_id == key_text(response_id))
    found = connection.scalar(last)
    return 0 if found is None else int(found) + 1


def add_events(connection: Connection, response_id: str, new: Sequence[Json]) -> int:
    """One more piece of a stream. Returns its bytes as stored."""
    if not new:
        return 0
    packed = pack(list(new))
    row = {
        "response_id": key_text(response_id),
        "last_number": new[-1]["sequence_number"],
        "events": packed,
    }
    connection.execute(insert(events).values(row))
    return len(packed)


def remove(connection: Connection, response_id: str) -> None:
    """Take a response out, with the turns that nothing needs any more."""
    turn_id = connection.scalar(select(responses.c.turn_id).where(has_id(response_id)))
    connection.execute(delete(responses).where(has_id(response_id)))
    connection.execute(delete(events).where(events.c.response_id == key_text(response_id)))
    while turn_id is not None and not _is_needed(connection, turn_id):
        connection.execute(delete(items).where(items.c.turn_id == turn_id))
        parent = connection.scalar(select(turns.c.parent).where(turns.c.turn_id == turn_id))
        connection.execute(delete(turns).where(turns.c.turn_id == turn_id))
        turn_id = parent


def _is_needed(connection: Connection, turn_id: int) -> bool:
    is_used = exists().where(responses.c.turn_id == turn_id)
    has_next = exists().where(turns.c.parent == turn_id)
    return bool(connection.scalar(select(is_used | has_next)))
