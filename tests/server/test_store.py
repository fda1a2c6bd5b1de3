"""Stored responses: what is kept, for whom, how long, and through what."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harmonium.errors import ConfigError
from harmonium.harmony.messages import Message
from harmonium.server.responses_items import Entry
from harmonium.server.responses_seal import SealedReasoning
from harmonium.server.store import ResponseStore, StoredTurn


def _body(response_id: str, status: str = "completed", **fields: Any) -> dict[str, Any]:
    return {"id": response_id, "status": status, "output": [], **fields}


def _turn(previous: str | None, *texts: str, date: str = "2026-11-25") -> StoredTurn:
    entries = tuple(Entry(Message("user", text), f"msg_{text}") for text in texts)
    items = tuple({"id": f"msg_{text}", "type": "message", "role": "user", "content": text} for text in texts)
    return StoredTurn(previous, date, items, entries)


def _said(store: ResponseStore, response_id: str) -> list[str]:
    found = store.conversation(response_id)
    assert found is not None
    return [entry.message.content for entry in found.entries]


def test_conversation_is_that_of_all_responses_before_it() -> None:
    store = ResponseStore()
    store.put(_body("r1"), _turn(None, "a", date="2026-11-25"))
    store.put(_body("r2"), _turn("r1", "b", "c", date="2026-11-26"))
    store.put(_body("r2b"), _turn("r1", "other branch"))
    store.put(_body("r3"), _turn("r2", "d"))
    assert _said(store, "r3") == ["a", "b", "c", "d"]
    assert _said(store, "r2b") == ["a", "other branch"]
    found = store.conversation("r3")
    assert found is not None
    assert found.date == "2026-11-25"


def test_messages_come_back_exactly() -> None:
    store = ResponseStore()
    message = Message("assistant", "x\ud800", channel="analysis", token_ids=(200006, 1, 200007))
    call = Message(
        "assistant", "{}", channel="commentary", recipient="functions.f", content_type="<|constrain|>json"
    )
    result = Message("tool", "22", channel="commentary", recipient="assistant", name="functions.f")
    entries = (Entry(message, "rs_1"), Entry(call, "fc_1", "call_1"), Entry(result, "fco_1", "call_1"))
    store.put(_body("r1"), StoredTurn(None, None, (), entries))
    found = store.conversation("r1")
    assert found is not None
    assert found.entries == entries


def test_deleting_a_response_in_the_middle_keeps_the_conversation_whole() -> None:
    store = ResponseStore()
    store.put(_body("r1"), _turn(None, "a"))
    store.put(_body("r2"), _turn("r1", "b"))
    assert store.delete("r1")
    assert not store.delete("r1")
    assert store.body("r1") is None
    assert store.conversation("r1") is None
    assert _said(store, "r2") == ["a", "b"]


def test_turns_that_nobody_needs_are_gone() -> None:
    store = ResponseStore()
    for index in range(5):
        store.put(_body(f"r{index}"), _turn(f"r{index - 1}" if index else None, f"t{index}"))
    for index in range(5):
        store.delete(f"r{index}")
    count = store._scalar("SELECT (SELECT count(*) FROM turns) + (SELECT count(*) FROM items)")
    assert (count, len(store)) == (0, 0)


@pytest.mark.parametrize("limits", [{"max_responses": 3}, {"max_bytes": 2000}])
def test_memory_is_bounded_and_the_least_recently_used_goes_first(limits: dict[str, int]) -> None:
    store = ResponseStore(**limits)
    for index in range(50):
        store.put(_body(f"r{index}"), _turn(None, f"text {index}"))
        store.conversation("r0")  # used all the time
    assert store.body("r0") is not None
    assert store.body("r1") is None
    assert store.body("r49") is not None
    assert len(store) <= 50 // 2
    assert store._size == store._scalar("SELECT sum(size) FROM responses")


def test_long_chain_whose_last_response_goes_is_freed() -> None:
    store = ResponseStore(max_responses=2)
    for index in range(100):
        store.put(_body(f"r{index}"), _turn(f"r{index - 1}" if index else None, f"t{index}"))
    assert len(_said(store, "r99")) == 100
    for index in range(2):
        store.put(_body(f"new{index}"), _turn(None, "x"))
    assert store._scalar("SELECT count(*) FROM turns") == 2


def test_response_that_is_running_is_never_evicted() -> None:
    store = ResponseStore(max_responses=1)
    store.put(_body("r1", "queued"), _turn(None, "a"))
    store.put(_body("r2"), _turn(None, "b"))
    assert store.body("r1") is not None


def test_owner_alone_sees_a_response() -> None:
    store = ResponseStore()
    store.put(_body("r1"), _turn(None, "a"), "ann")
    assert store.body("r1", "ann") is not None
    assert store.body("r1", "bob") is None
    assert store.conversation("r1", "bob") is None
    assert store.input_items("r1", "bob") is None
    assert store.find_item("msg_a", "bob") is None
    assert not store.delete("r1", "bob")
    assert store.find_item("msg_a", "ann") is not None


def test_put_again_replaces_state_and_events() -> None:
    store = ResponseStore()
    store.put(_body("r1", "queued"), _turn(None, "a"))
    store.put(_body("r1"), _turn(None, "a", "answer"), events=[{"sequence_number": 0}])
    assert (store.body("r1") or {})["status"] == "completed"
    assert store.events("r1") == [{"sequence_number": 0}]
    assert _said(store, "r1") == ["a", "answer"]
    assert len(store) == 1


def test_file_keeps_responses_and_seals(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    first = ResponseStore(path)
    first.put(_body("r1"), _turn(None, "a"))
    sealed = first.seal.close(SealedReasoning("thought", (1, 2)))
    first.close()
    second = ResponseStore(path)
    assert _said(second, "r1") == ["a"]
    assert second.seal.open(sealed) == SealedReasoning("thought", (1, 2))
    second.close()


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


_WRITER = """
import sys
from harmonium.server.store import ResponseStore, StoredTurn
store = ResponseStore(sys.argv[1])
index = 0
while True:
    store.put({"id": f"r{index}", "status": "completed", "output": []}, StoredTurn(None, None, (), ()))
    print(index, flush=True)  # as an answer that a client has seen
    index += 1
"""


def test_killed_process_loses_no_completed_response(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 200:
            pass
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
    last = int(rest[-1]) if rest else 200
    store = ResponseStore(path)
    assert [index for index in range(last + 1) if store.body(f"r{index}") is None] == []
    store.close()


def test_file_that_is_no_store_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello, this is no database at all\n" * 100)
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        ResponseStore(path)
    with pytest.raises(ConfigError, match="nowhere"):
        ResponseStore(tmp_path / "nowhere" / "store.db")
