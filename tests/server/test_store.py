"""Stored responses: what is kept, for whom, how long, and through what. One law for all stores."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harmonium.errors import ConfigError, StoreError
from harmonium.harmony.messages import Message
from harmonium.server.responses_items import Entry
from harmonium.server.responses_seal import SealedReasoning
from harmonium.server.store import ResponseStore
from harmonium.server.store_records import Store, StoredTurn
from tests.server.conftest import empty_database


class Opener:
    """Opens one and the same store as often as it is called.

    slack: how many responses it may keep beyond its limit. word: the store in a word, for another process.
    """

    def __init__(self, word: str, slack: int) -> None:
        self.word = word
        self.slack = slack
        self._opened: list[Store] = []

    def __call__(self, **limits: int) -> Any:
        store = open_word(self.word, **limits)
        self._opened.append(store)
        return store

    def close(self) -> None:
        for store in self._opened:
            store.close()


def open_word(word: str, **limits: int) -> Any:
    """A file, or a URL."""
    if "://" not in word:
        return ResponseStore(word, **limits)
    from harmonium.server.shared_store import SharedResponseStore

    return SharedResponseStore(word, **limits)


@pytest.fixture(params=["file", "sqlite", "postgresql"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    if request.param == "file":
        found = Opener(str(tmp_path / "store.db"), 0)
    else:
        found = Opener(empty_database(request, request.param, tmp_path), 31)
    yield found
    found.close()


@pytest.fixture
def store(opener: Opener) -> Any:
    return opener()


def _body(response_id: str, status: str = "completed", **fields: Any) -> dict[str, Any]:
    return {"id": response_id, "status": status, "output": [], **fields}


def _turn(previous: str | None, *texts: str, date: str = "2026-11-25") -> StoredTurn:
    entries = tuple(Entry(Message("user", text), f"msg_{text}") for text in texts)
    items = tuple({"id": f"msg_{text}", "type": "message", "role": "user", "content": text} for text in texts)
    return StoredTurn(previous, date, items, entries)


def _said(store: Store, response_id: str) -> list[str]:
    found = store.conversation(response_id)
    assert found is not None
    return [entry.message.content for entry in found.entries]


def _count(store: Any, table: str) -> int:
    """Rows of responses, turns, items."""
    if isinstance(store, ResponseStore):
        return store._scalar(f"SELECT count(*) FROM {table}")
    with store._database.reading() as connection:
        return int(connection.exec_driver_sql(f"SELECT count(*) FROM harmonium_{table}").scalar())


def test_conversation_is_that_of_all_responses_before_it(store: Any) -> None:
    store.put(_body("r1"), _turn(None, "a", date="2026-11-25"))
    store.put(_body("r2"), _turn("r1", "b", "c", date="2026-11-26"))
    store.put(_body("r2b"), _turn("r1", "other branch"))
    store.put(_body("r3"), _turn("r2", "d"))
    assert _said(store, "r3") == ["a", "b", "c", "d"]
    assert _said(store, "r2b") == ["a", "other branch"]
    found = store.conversation("r3")
    assert found is not None
    assert found.date == "2026-11-25"


def test_messages_come_back_exactly(store: Any) -> None:
    message = Message("assistant", "x\ud800\0", channel="analysis", token_ids=(200006, 1, 200007))
    call = Message(
        "assistant", "{}", channel="commentary", recipient="functions.f", content_type="<|constrain|>json"
    )
    result = Message("tool", "22", channel="commentary", recipient="assistant", name="functions.f")
    entries = (Entry(message, "rs_1"), Entry(call, "fc_1", "call_1"), Entry(result, "fco_1", "call_1"))
    store.put(_body("r1"), StoredTurn(None, None, (), entries))
    found = store.conversation("r1")
    assert found is not None
    assert found.entries == entries


def test_deleting_a_response_in_the_middle_keeps_the_conversation_whole(store: Any) -> None:
    store.put(_body("r1"), _turn(None, "a"))
    store.put(_body("r2"), _turn("r1", "b"))
    assert store.delete("r1")
    assert not store.delete("r1")
    assert store.body("r1") is None
    assert store.conversation("r1") is None
    assert _said(store, "r2") == ["a", "b"]


def test_deleting_what_a_running_response_continues_keeps_its_conversation_whole(store: Any) -> None:
    store.put(_body("r1"), _turn(None, "a"))
    store.put(_body("r2", "queued"), _turn("r1", "b"))
    store.delete("r1")
    assert store.end(_body("r2"), _turn("r1", "b", "answer"), [])
    assert _said(store, "r2") == ["a", "b", "answer"]


def test_deleting_what_an_answer_continues_while_it_is_made_keeps_its_conversation_whole(store: Any) -> None:
    earlier = _turn(None, "a").entries
    store.put(_body("r2"), replace(_turn("r1", "b"), earlier=earlier))  # r1 was deleted
    assert _said(store, "r2") == ["a", "b"]
    store.put(_body("r3", "queued"), replace(_turn("r1", "c"), earlier=earlier))
    store.end(_body("r3"), replace(_turn("r1", "c", "answer"), earlier=earlier), [])
    assert _said(store, "r3") == ["a", "c", "answer"]
    store.put(_body("r4"), replace(_turn("r2", "d"), earlier=(*earlier, *_turn(None, "b").entries)))
    assert _said(store, "r4") == ["a", "b", "d"]


def test_turns_that_nobody_needs_are_gone(store: Any) -> None:
    for index in range(5):
        store.put(_body(f"r{index}"), _turn(f"r{index - 1}" if index else None, f"t{index}"))
    for index in (2, 0, 1, 4, 3):
        store.delete(f"r{index}")
    assert [_count(store, table) for table in ("responses", "turns", "items")] == [0, 0, 0]


@pytest.mark.parametrize("limits", [{"max_responses": 8}, {"max_bytes": 2000}])
def test_memory_is_bounded_and_the_least_recently_used_goes_first(
    opener: Opener, limits: dict[str, int]
) -> None:
    store = opener(**limits)
    for index in range(100):
        store.put(_body(f"r{index}"), _turn(None, f"text {index}"))
        store.conversation("r0")  # used all the time
    assert store.body("r0") is not None
    assert store.body("r1") is None
    assert store.body("r99") is not None
    assert len(store) <= 25 + opener.slack
    if isinstance(store, ResponseStore):
        assert store._size == store._scalar("SELECT sum(size) FROM responses")


def test_long_chain_whose_last_response_goes_is_freed(opener: Opener) -> None:
    store = opener(max_responses=2)
    for index in range(100):
        store.put(_body(f"r{index}"), _turn(f"r{index - 1}" if index else None, f"t{index}"))
    assert len(_said(store, "r99")) == 100
    for index in range(2 + 2 * opener.slack):
        store.put(_body(f"new{index}"), _turn(None, "x"))
    assert _count(store, "turns") <= 2 + opener.slack


def test_response_that_is_running_is_never_evicted(opener: Opener) -> None:
    store = opener(max_responses=1)
    store.put(_body("r1", "queued"), _turn(None, "a"))
    for index in range(2 + opener.slack):
        store.put(_body(f"n{index}"), _turn(None, "b"))
    assert store.body("r1") is not None
    assert store.body("n0") is None


def test_owner_alone_sees_a_response(store: Any) -> None:
    store.put(_body("r1", "queued"), _turn(None, "a"), "ann")
    store.end(_body("r1"), _turn(None, "a"), [{"sequence_number": 0}])
    assert store.body("r1", "ann") == _body("r1")
    assert store.events("r1", "ann") == [{"sequence_number": 0}]
    assert store.body("r1", "bob") is None
    assert store.events("r1", "bob") is None
    assert store.conversation("r1", "bob") is None
    assert store.input_items("r1", "bob") is None
    assert store.find_item("msg_a", "bob") is None
    assert not store.delete("r1", "bob")
    assert store.find_item("msg_a", "ann") is not None
    store.put(_body("r2"), _turn("r1", "b"), "bob")
    found = store.conversation("r2", "bob")
    assert found is not None
    assert [entry.message.content for entry in found.entries] == ["b"]


def test_end_of_a_background_response_replaces_its_state(store: Any) -> None:
    store.put(_body("r1", "queued"), _turn(None, "a"))
    assert store.events("r1") is None
    events = [{"sequence_number": number} for number in range(4)]
    ended = {**_body("r1"), "output": [{"id": "msg_answer"}]}
    assert store.end(
        ended, StoredTurn(None, None, _turn(None, "a").items, _turn(None, "a", "answer").entries), events
    )
    assert store.body("r1") == ended
    assert [item["id"] for item in store.input_items("r1")] == ["msg_a"]
    assert store.events("r1") == events
    assert store.events("r1", after=2) == events[3:]
    assert store.events("r1", after=3) == []
    assert _said(store, "r1") == ["a", "answer"]
    assert store.find_item("msg_answer") is not None
    assert len(store) == _count(store, "turns") == 1


def test_response_that_is_gone_or_has_ended_does_not_end_again(store: Any) -> None:
    store.put(_body("r1", "in_progress"), _turn(None, "a"))
    store.delete("r1")
    assert not store.end(_body("r1"), _turn(None, "a"), [])
    assert store.body("r1") is None
    store.put(_body("r2", "in_progress"), _turn(None, "a"))
    assert store.end(_body("r2", "cancelled"), _turn(None, "a"), [])
    assert not store.end(_body("r2"), _turn(None, "a"), [])
    assert store.body("r2") == _body("r2", "cancelled")


def test_ids_of_any_kind_are_found_or_not(store: Any) -> None:
    odd = ["x\0", "é" * 5000, "a" * 5000, "'; --", ""]
    entries = tuple(Entry(Message("user", str(place)), name) for place, name in enumerate(odd))
    listed = tuple({"id": name, "type": "message", "content": "x"} for name in odd)
    store.put(_body("r1"), StoredTurn(None, None, listed, entries))
    for place, name in enumerate(odd):
        found = store.find_item(name)
        assert found is not None
        assert (found[0]["id"], found[1].message.content) == (name, str(place))
        assert store.body(name) is None


def test_responses_and_seals_are_there_when_it_is_opened_again(opener: Opener) -> None:
    first = opener()
    first.put(_body("r1"), _turn(None, "a"))
    sealed = first.seal.close(SealedReasoning("thought", (1, 2)))
    first.close()
    second = opener()
    assert _said(second, "r1") == ["a"]
    assert second.seal.open(sealed) == SealedReasoning("thought", (1, 2))


def test_limits_under_which_nothing_could_be_kept_are_refused(opener: Opener) -> None:
    with pytest.raises(ConfigError, match="max_responses is 0"):
        opener(max_responses=0)


_WRITER = """
import sys
from harmonium.server.store_records import StoredTurn
word = sys.argv[1]
if "://" in word:
    from harmonium.server.shared_store import SharedResponseStore as Opened
else:
    from harmonium.server.store import ResponseStore as Opened
store = Opened(word)
index = 0
while True:
    store.put({"id": f"r{index}", "status": "completed", "output": []}, StoredTurn(None, None, (), ()))
    print(index, flush=True)  # as an answer that a client has seen
    index += 1
"""


def test_killed_process_loses_no_completed_response(opener: Opener) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, opener.word], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 100:
            pass
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
    last = int(rest[-1]) if rest else 100
    store = opener()
    assert [index for index in range(last + 1) if store.body(f"r{index}") is None] == []


def test_response_that_ran_when_the_process_ended_has_failed(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    first = ResponseStore(path)
    first.put(_body("r1", "in_progress"), _turn(None, "a"))
    first.close()
    second = ResponseStore(path)
    body = second.body("r1")
    assert body is not None
    assert (body["status"], body["error"]["code"]) == ("failed", "server_error")
    second.close()


def test_file_that_fails_is_a_503_and_nothing_is_half_written(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path / "store.db")
    store.put(_body("r1"), _turn(None, "a"))
    pages = store._scalar("PRAGMA page_count")
    store._db.execute(f"PRAGMA max_page_count = {pages + 8}")  # as a disk that is full
    with pytest.raises(StoreError, match=r"store\.db failed: database or disk is full") as caught:
        for index in range(1000):
            store.put(
                _body(f"n{index}", text=[f"{n}" for n in range(index * 9999, index * 9999 + 9999)]),
                _turn(None),
            )
    assert caught.value.status == 503
    assert store.body("r1") == _body("r1")
    assert len(store) == store._scalar("SELECT count(*) FROM responses")
    assert store._size == store._scalar("SELECT sum(size) FROM responses")
    store.close()


def test_file_that_is_no_store_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello, this is no database at all\n" * 100)
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        ResponseStore(path)
    with pytest.raises(ConfigError, match="nowhere"):
        ResponseStore(tmp_path / "nowhere" / "store.db")
