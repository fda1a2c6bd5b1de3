"""Stored responses and the conversations that they are part of, in SQLite.

    store = ResponseStore(path)                  # None: in memory
    store.put(response, turn)                    # on disk when it returns: kill -9 loses nothing after it
    store.body("resp_1", owner), store.conversation("resp_1", owner), store.delete("resp_1", owner)

A response continues at most one earlier response. Its turn (input and output) is kept as long as the
response or one that continues it is stored, so deleting a response in the middle breaks no conversation.
Least recently used responses go when there are more than `max_responses` or they take more than `max_bytes`.

Calls block for a few milliseconds at most and may come from any thread, one at a time each.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harmonium.errors import ConfigError, StoreError
from harmonium.server.responses_items import Entry, Item
from harmonium.server.responses_seal import Seal, new_key
from harmonium.server.store_records import (
    MAX_BYTES,
    MAX_RESPONSES,
    StoredConversation,
    StoredTurn,
    check_limits,
    find_stored_item,
    interrupted,
    pack,
    pack_turn,
    unpack,
)

_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS turns (
    turn_id INTEGER PRIMARY KEY, parent INTEGER, date TEXT, items BLOB NOT NULL, entries BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS turns_by_parent ON turns (parent);
CREATE TABLE IF NOT EXISTS responses (
    response_id TEXT PRIMARY KEY, owner TEXT NOT NULL, turn_id INTEGER NOT NULL, used REAL NOT NULL,
    status TEXT NOT NULL, body BLOB NOT NULL, events BLOB, size INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS responses_by_use ON responses (used);
CREATE INDEX IF NOT EXISTS responses_by_turn ON responses (turn_id);
CREATE TABLE IF NOT EXISTS items (item_id TEXT NOT NULL, turn_id INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS items_by_id ON items (item_id);
CREATE INDEX IF NOT EXISTS items_by_turn ON items (turn_id);
"""


class ResponseStore:
    """Responses of one server. owner: whoever made a response; nobody else can see it."""

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        max_responses: int = MAX_RESPONSES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Open or make the file. Raises ConfigError when it cannot be used."""
        check_limits(max_responses, max_bytes)
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._name = name = ":memory:" if path is None else str(path)
        try:
            self._db = sqlite3.connect(name, check_same_thread=False, isolation_level=None, timeout=10.0)
            self._prepare()
        except sqlite3.Error as error:
            raise ConfigError(f"store {name} cannot be used: {error}") from None
        self.seal = Seal(self._key())
        self._measure()
        self._fail_interrupted()

    def _prepare(self) -> None:
        # WAL: a commit survives the death of the process; NORMAL: the last ones may go with the machine.
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(_SCHEMA)
        found = self._scalar("PRAGMA user_version")
        if found not in (0, _VERSION):
            raise sqlite3.DatabaseError(f"it has version {found}; this program writes {_VERSION}")
        self._db.execute(f"PRAGMA user_version = {_VERSION}")

    def _key(self) -> bytes:
        self._db.execute("INSERT OR IGNORE INTO meta VALUES ('seal_key', ?)", (new_key(),))
        return bytes(self._db.execute("SELECT value FROM meta WHERE name = 'seal_key'").fetchone()[0])

    def _measure(self) -> None:
        self._size = self._scalar("SELECT coalesce(sum(size), 0) FROM responses")
        self._count = self._scalar("SELECT count(*) FROM responses")

    def _scalar(self, query: str, parameters: Sequence[Any] = ()) -> int:
        return int(self._db.execute(query, parameters).fetchone()[0])

    def _fail_interrupted(self) -> None:
        """Responses that ran when an earlier process ended will not go on."""
        rows = self._db.execute(
            "SELECT response_id, body FROM responses WHERE status IN ('queued', 'in_progress')"
        ).fetchall()
        for response_id, blob in rows:
            self._db.execute(
                "UPDATE responses SET status = 'failed', body = ? WHERE response_id = ?",
                (pack(interrupted(unpack(blob))), response_id),
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The connection for this thread. Raises StoreError when the file fails."""
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise StoreError(f"store {self._name} failed: {error}") from None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._alone():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                self._measure()
                raise

    def put(self, body: dict[str, Any], turn: StoredTurn, owner: str = "") -> None:
        """Store a new response with its turn."""
        packed = pack(body)
        with self._transaction():
            self._remove(body["id"])
            parent = self._turn_of(turn.previous, owner)
            packed_turn = pack_turn(turn if parent is not None else turn.alone)
            size = len(packed) + packed_turn.size
            turn_id = self._db.execute(
                "INSERT INTO turns (parent, date, items, entries) VALUES (?, ?, ?, ?)",
                (parent, turn.date, packed_turn.items, packed_turn.entries),
            ).lastrowid
            self._add_ids(turn.item_ids, turn_id)
            self._db.execute(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, NULL, ?)",
                (body["id"], owner, turn_id, time.time(), body["status"], packed, size),
            )
            self._size += size
            self._count += 1
            self._evict(keep=body["id"])

    def end(self, body: dict[str, Any], turn: StoredTurn, events: Sequence[Any]) -> bool:
        """Store how a background response ended, with the events of its stream. False where it is gone."""
        packed, packed_events = pack(body), pack(list(events))
        with self._transaction():
            row = self._db.execute(
                "SELECT turn_id, parent, size FROM responses JOIN turns USING (turn_id)"
                " WHERE response_id = ? AND status IN ('queued', 'in_progress')",
                (body["id"],),
            ).fetchone()
            if row is None:
                return False
            turn_id, parent, old_size = row
            packed_turn = pack_turn(turn if parent is not None else turn.alone)
            size = len(packed) + len(packed_events) + packed_turn.size
            self._db.execute("UPDATE turns SET entries = ? WHERE turn_id = ?", (packed_turn.entries, turn_id))
            self._db.execute("DELETE FROM items WHERE turn_id = ?", (turn_id,))
            self._add_ids(turn.item_ids, turn_id)
            self._db.execute(
                "UPDATE responses SET used = ?, status = ?, body = ?, events = ?, size = ?"
                " WHERE response_id = ?",
                (time.time(), body["status"], packed, packed_events, size, body["id"]),
            )
            self._size += size - old_size
            self._evict(keep=body["id"])
        return True

    def _add_ids(self, item_ids: Sequence[str], turn_id: int | None) -> None:
        self._db.executemany("INSERT INTO items VALUES (?, ?)", [(item_id, turn_id) for item_id in item_ids])

    def body(self, response_id: str, owner: str = "") -> dict[str, Any] | None:
        """The response object; None for one that is not stored."""
        found = self._column("body", response_id, owner)
        return None if found is None else unpack(found)

    def events(self, response_id: str, owner: str = "", after: int = -1) -> list[dict[str, Any]] | None:
        """The events of its stream with a higher sequence number, if they were stored."""
        found = self._column("events", response_id, owner)
        return None if found is None else [e for e in unpack(found) if e["sequence_number"] > after]

    def input_items(self, response_id: str, owner: str = "") -> list[Item] | None:
        """The input of its request, oldest first; None for a response that is not stored."""
        with self._alone():
            row = self._db.execute(
                "SELECT items FROM turns JOIN responses USING (turn_id) WHERE response_id = ? AND owner = ?",
                (response_id, owner),
            ).fetchone()
        return None if row is None else list(unpack(row[0]))

    def conversation(self, response_id: str, owner: str = "") -> StoredConversation | None:
        """Everything said up to the end of this response, which counts as used; None if it is not stored."""
        with self._transaction():
            turn_id = self._turn_of(response_id, owner)
            if turn_id is None:
                return None
            self._db.execute(
                "UPDATE responses SET used = ? WHERE response_id = ?", (time.time(), response_id)
            )
            rows = self._db.execute(
                "WITH RECURSIVE chain (turn_id, parent, date, entries, depth) AS ("
                " SELECT turn_id, parent, date, entries, 0 FROM turns WHERE turn_id = ?"
                " UNION ALL SELECT turns.turn_id, turns.parent, turns.date, turns.entries, depth + 1"
                " FROM turns JOIN chain ON turns.turn_id = chain.parent)"
                " SELECT date, entries FROM chain ORDER BY depth DESC",
                (turn_id,),
            ).fetchall()
        entries = tuple(Entry.from_json(record) for _, packed in rows for record in unpack(packed))
        return StoredConversation(entries, rows[0][0])

    def find_item(self, item_id: str, owner: str = "") -> tuple[Item, Entry] | None:
        """The newest stored item of this id, and what it means."""
        with self._alone():
            row = self._db.execute(
                "SELECT turns.items, turns.entries, responses.body FROM items JOIN turns USING (turn_id)"
                " JOIN responses USING (turn_id) WHERE item_id = ? AND owner = ?"
                " ORDER BY turn_id DESC LIMIT 1",
                (item_id, owner),
            ).fetchone()
        return None if row is None else find_stored_item(item_id, *row)

    def delete(self, response_id: str, owner: str = "") -> bool:
        """Forget a response. Whether there was one."""
        with self._transaction():
            found = self._turn_of(response_id, owner) is not None
            if found:
                self._remove(response_id)
        return found

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        with self._lock:
            self._db.close()

    def __del__(self) -> None:
        # An app in memory may be dropped without ceremony; Python warns of a connection left open.
        if hasattr(self, "_db"):
            self._db.close()

    def _column(self, name: str, response_id: str, owner: str) -> bytes | None:
        with self._alone():
            row = self._db.execute(
                f"SELECT {name} FROM responses WHERE response_id = ? AND owner = ?", (response_id, owner)
            ).fetchone()
        return None if row is None else row[0]

    def _turn_of(self, response_id: str | None, owner: str) -> int | None:
        row = self._db.execute(
            "SELECT turn_id FROM responses WHERE response_id = ? AND owner = ?", (response_id, owner)
        ).fetchone()
        return None if row is None else int(row[0])

    def _remove(self, response_id: str) -> None:
        """Take a response out, with the turns that nothing needs any more."""
        row = self._db.execute(
            "SELECT turn_id, size FROM responses WHERE response_id = ?", (response_id,)
        ).fetchone()
        if row is None:
            return
        turn_id, size = row
        self._db.execute("DELETE FROM responses WHERE response_id = ?", (response_id,))
        self._size -= size
        self._count -= 1
        while turn_id is not None and not self._is_needed(turn_id):
            self._db.execute("DELETE FROM items WHERE turn_id = ?", (turn_id,))
            parent = self._db.execute("SELECT parent FROM turns WHERE turn_id = ?", (turn_id,)).fetchone()[0]
            self._db.execute("DELETE FROM turns WHERE turn_id = ?", (turn_id,))
            turn_id = parent

    def _is_needed(self, turn_id: int) -> bool:
        return bool(
            self._scalar(
                "SELECT EXISTS (SELECT 1 FROM responses WHERE turn_id = ?1)"
                " OR EXISTS (SELECT 1 FROM turns WHERE parent = ?1)",
                (turn_id,),
            )
        )

    def _evict(self, keep: str) -> None:
        """Least recently used first; the response just stored stays, and one that still runs."""
        while self._size > self._max_bytes or self._count > self._max_responses:
            row = self._db.execute(
                "SELECT response_id FROM responses WHERE response_id != ?"
                " AND status NOT IN ('queued', 'in_progress') ORDER BY used LIMIT 1",
                (keep,),
            ).fetchone()
            if row is None:
                return
            self._remove(row[0])
