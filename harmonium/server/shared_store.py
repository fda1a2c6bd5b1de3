"""Stored responses in a database that several servers share.

    store = SharedResponseStore("postgresql://harmonium@db/harmonium")

What `ResponseStore` says of conversations, owners and eviction holds here too. In addition a response that
runs in the background is known to all servers: its own one tells of it (`beat`) with the events so far, and
one that was not told of for `lost_seconds` has failed, which whoever asks for it finds out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from harmonium.server.responses_items import Entry, Item
from harmonium.server.responses_seal import Seal, new_key
from harmonium.server.shared_database import Database
from harmonium.server.shared_rows import (
    add_events,
    add_ids,
    chain_of,
    has_id,
    key_text,
    next_number,
    owned,
    remove,
    turn_of,
)
from harmonium.server.shared_tables import events as event_table
from harmonium.server.shared_tables import items, meta, responses, turns
from harmonium.server.store_records import (
    MAX_BYTES,
    MAX_RESPONSES,
    RUNNING,
    Json,
    Progress,
    StoredConversation,
    StoredTurn,
    check_limits,
    find_stored_item,
    interrupted,
    pack,
    pack_turn,
    unpack,
)

LOST_SECONDS = 30.0

_PUTS_PER_EVICTION = 32
"""Counting all rows takes long, so that each server looks for too many of them only so often."""

_MOST_EVICTED = 1024
"""At a time: others wait meanwhile."""


class SharedResponseStore:
    """Responses of all servers that were given the same URL."""

    def __init__(
        self,
        url: str,
        *,
        max_responses: int = MAX_RESPONSES,
        max_bytes: int = MAX_BYTES,
        lost_seconds: float = LOST_SECONDS,
    ) -> None:
        """Reach the database and make the tables. Raises ConfigError when it cannot be used."""
        check_limits(max_responses, max_bytes)
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._lost_seconds = lost_seconds
        self._num_puts = 0
        self._database = Database(url)
        self._is_running = responses.c.status.in_(RUNNING)
        self._is_lost = self._is_running & (responses.c.seen < self._database.clock - lost_seconds)
        self.seal = Seal(self._key())

    def _key(self) -> bytes:
        with self._database.writing() as connection:
            query = select(meta.c.value).where(meta.c.name == "seal_key")
            if connection.scalar(query) is None:
                connection.execute(insert(meta).values(name="seal_key", value=new_key()))
            return bytes(connection.scalar(query))

    def check(self) -> None:
        """Raises StoreError while the database is away."""
        with self._database.reading() as connection:
            connection.execute(select(self._database.clock))

    def put(self, body: Json, turn: StoredTurn, owner: str = "") -> None:
        """Store a new response with its turn. Raises StoreError."""
        packed = pack(body)
        with self._database.writing() as connection:
            remove(connection, body["id"])
            parent = turn_of(connection, turn.previous, owner)
            packed_turn = pack_turn(turn if parent is not None else turn.alone)
            new_turn = insert(turns).values(
                parent=parent,
                date=turn.date,
                input_items=packed_turn.items,
                entries=packed_turn.entries,
            )
            turn_id = connection.execute(new_turn).inserted_primary_key[0]
            add_ids(connection, turn_id, turn.item_ids)
            row = {
                "response_id": key_text(body["id"]),
                "owner": owner,
                "turn_id": turn_id,
                "used": self._database.clock,
                "seen": self._database.clock,
                "status": body["status"],
                "is_cancelled": False,
                "body": packed,
                "size": len(packed) + packed_turn.size,
            }
            connection.execute(insert(responses).values(row))
            if self._num_puts % _PUTS_PER_EVICTION == 0:
                self._evict(connection, keep=body["id"])
            self._num_puts += 1

    def end(self, body: Json, turn: StoredTurn, events: Sequence[Json]) -> bool:
        """Store how a background response ended. False where it is gone, or has ended. Raises StoreError."""
        packed = pack(body)
        with self._database.writing() as connection:
            is_it = (has_id(body["id"]), self._is_running)
            found = select(turns.c.turn_id, turns.c.parent).join(
                responses, responses.c.turn_id == turns.c.turn_id
            )
            row = connection.execute(found.where(*is_it)).first()
            if row is None:
                return False
            turn_id = row.turn_id
            packed_turn = pack_turn(turn if row.parent is not None else turn.alone)
            of_turn = turns.c.turn_id == turn_id
            connection.execute(update(turns).where(of_turn).values(entries=packed_turn.entries))
            connection.execute(delete(items).where(items.c.turn_id == turn_id))
            add_ids(connection, turn_id, turn.item_ids)
            connection.execute(delete(event_table).where(event_table.c.response_id == key_text(body["id"])))
            size = len(packed) + packed_turn.size + add_events(connection, body["id"], events)
            row = {"used": self._database.clock, "status": body["status"], "body": packed, "size": size}
            connection.execute(update(responses).where(*is_it).values(row))
        return True

    def body(self, response_id: str, owner: str = "") -> Json | None:
        """The response object; None for one that is not stored. Raises StoreError."""
        row = self._row(response_id, owner)
        return None if row is None else unpack(row.body)

    def events(self, response_id: str, owner: str = "", after: int = -1) -> list[Json] | None:
        """The events of its stream with a higher sequence number, of one that runs those that were told of.

        None where no stream is stored. Raises StoreError.
        """
        if self._row(response_id, owner) is None:
            return None
        query = select(event_table.c.events).where(event_table.c.response_id == key_text(response_id))
        pieces = query.where(event_table.c.last_number > after).order_by(event_table.c.last_number)
        with self._database.reading() as connection:
            has_any = connection.scalar(query.limit(1)) is not None
            found = [event for piece in connection.scalars(pieces) for event in unpack(piece)]
        return [event for event in found if event["sequence_number"] > after] if has_any else None

    def input_items(self, response_id: str, owner: str = "") -> list[Item] | None:
        """The input of its request, oldest first; None for one that is not stored. Raises StoreError."""
        query = select(turns.c.input_items).join(responses, responses.c.turn_id == turns.c.turn_id)
        with self._database.reading() as connection:
            packed = connection.scalar(query.where(*owned(response_id, owner)))
        return None if packed is None else list(unpack(packed))

    def conversation(self, response_id: str, owner: str = "") -> StoredConversation | None:
        """Everything said up to the end of this response, which counts as used; None if it is not stored.

        Raises StoreError.
        """
        with self._database.writing() as connection:
            turn_id = turn_of(connection, response_id, owner)
            if turn_id is None:
                return None
            used = update(responses).where(has_id(response_id)).values(used=self._database.clock)
            connection.execute(used)
            rows = connection.execute(chain_of(turn_id)).all()
        entries = tuple(Entry.from_json(record) for row in rows for record in unpack(row.entries))
        return StoredConversation(entries, rows[0].date)

    def find_item(self, item_id: str, owner: str = "") -> tuple[Item, Entry] | None:
        """The newest stored item of this id, and what it means. Raises StoreError."""
        query = (
            select(turns.c.input_items, turns.c.entries, responses.c.body)
            .join(items, items.c.turn_id == turns.c.turn_id)
            .join(responses, responses.c.turn_id == turns.c.turn_id)
            .where(items.c.item_id == key_text(item_id), responses.c.owner == owner)
            .order_by(turns.c.turn_id.desc())
            .limit(1)
        )
        with self._database.reading() as connection:
            row = connection.execute(query).first()
        return None if row is None else find_stored_item(item_id, *row)

    def delete(self, response_id: str, owner: str = "") -> bool:
        """Forget a response; its server ends it if it runs. Whether there was one. Raises StoreError."""
        with self._database.writing() as connection:
            found = turn_of(connection, response_id, owner) is not None
            if found:
                remove(connection, response_id)
        return found

    def beat(self, progress: Mapping[str, Progress]) -> set[str]:
        """Tell that these responses still run here. Those that shall not any more. Raises StoreError."""
        unwanted = set(progress)
        with self._database.writing() as connection:
            columns = (responses.c.response_id, responses.c.is_cancelled)
            is_ours = responses.c.response_id.in_(list(progress))
            for row in connection.execute(select(*columns).where(is_ours, self._is_running)).all():
                now = progress[row.response_id]
                told: Json = {"seen": self._database.clock}
                if now.body is not None:
                    told |= {"status": now.body["status"], "body": pack(now.body)}
                connection.execute(update(responses).where(has_id(row.response_id)).values(told))
                new = now.events[next_number(connection, row.response_id) :]
                add_events(connection, row.response_id, new)
                if not row.is_cancelled:
                    unwanted.discard(row.response_id)
        return unwanted

    def request_cancel(self, response_id: str, owner: str = "") -> None:
        """Have the server that makes this response cancel it, at its next beat. Raises StoreError."""
        with self._database.writing() as connection:
            connection.execute(update(responses).where(*owned(response_id, owner)).values(is_cancelled=True))

    def cancel(self, response_id: str, owner: str = "") -> Json | None:
        """Cancel a response that runs, whatever its server does. Raises StoreError."""
        query = select(responses.c.body).where(*owned(response_id, owner), self._is_running)
        with self._database.writing() as connection:
            packed = connection.scalar(query)
            if packed is not None:
                self._end_here(connection, {**unpack(packed), "status": "cancelled"}, "response.incomplete")
        return self.body(response_id, owner)

    def close(self) -> None:
        """Close the connections. A second call does nothing."""
        self._database.close()

    def __len__(self) -> int:
        with self._database.reading() as connection:
            return int(connection.scalar(select(func.count()).select_from(responses)))

    def _row(self, response_id: str, owner: str) -> Row[Any] | None:
        """is_lost, body. A response whose server is gone has failed when this returns."""
        query = select(self._is_lost.label("is_lost"), responses.c.body).where(*owned(response_id, owner))
        with self._database.reading() as connection:
            row = connection.execute(query).first()
        if row is None or not row.is_lost or self._was_away():
            return row
        with self._database.writing() as connection:
            row = connection.execute(query).first()
            if row is not None and row.is_lost:
                self._end_here(connection, interrupted(unpack(row.body)), "response.failed")
            return connection.execute(query).first()

    def _was_away(self) -> bool:
        """Whether the database failed lately: other servers could not tell of their responses then."""
        failed_at = self._database.failed_at
        return failed_at is not None and time.monotonic() - failed_at < self._lost_seconds

    def _end_here(self, connection: Connection, body: Json, kind: str) -> None:
        """End a response of another server, with a last event of this type."""
        ended = {"status": body["status"], "body": pack(body)}
        connection.execute(update(responses).where(has_id(body["id"])).values(ended))
        number = next_number(connection, body["id"])
        add_events(connection, body["id"], [{"type": kind, "sequence_number": number, "response": body}])

    def _evict(self, connection: Connection, keep: str) -> None:
        """Least recently used first; the response just stored stays, and one that still runs."""
        totals = select(func.count(), func.coalesce(func.sum(responses.c.size), 0))
        count, size = connection.execute(totals).one()
        if count <= self._max_responses and size <= self._max_bytes:
            return
        query = (
            select(responses.c.response_id, responses.c.size)
            .where(~has_id(keep), ~self._is_running | self._is_lost)
            .order_by(responses.c.used)
            .limit(_MOST_EVICTED)
        )
        for row in connection.execute(query).all():
            if count <= self._max_responses and size <= self._max_bytes:
                return
            remove(connection, row.response_id)
            count, size = count - 1, size - row.size
