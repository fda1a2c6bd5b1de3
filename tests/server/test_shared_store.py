"""What a store that several servers share does beyond test_store.py: runs of others, races, failures."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harmonium.errors import ConfigError, StoreError
from harmonium.harmony.messages import Message
from harmonium.server.config import ServerConfig
from harmonium.server.responses_items import Entry
from harmonium.server.store import ResponseStore
from harmonium.server.store_records import Progress, SharedStore, StoredTurn
from harmonium.server.stores import open_store
from tests.server.postgres import missing, postgres

Opener = Callable[[], Any]


@pytest.fixture
def opener(shared_url: str) -> Iterator[Opener]:
    """Another server's store over the same database."""
    from harmonium.server.shared_store import SharedResponseStore

    opened: list[SharedResponseStore] = []

    def open_one() -> SharedResponseStore:
        opened.append(SharedResponseStore(shared_url))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def _body(response_id: str, status: str = "completed") -> dict[str, Any]:
    return {"id": response_id, "status": status, "output": []}


def _turn(previous: str | None, *texts: str) -> StoredTurn:
    entries = tuple(Entry(Message("user", text), f"msg_{text}") for text in texts)
    return StoredTurn(previous, "2026-11-25", (), entries)


def _events(*numbers: int) -> tuple[dict[str, Any], ...]:
    return tuple({"type": "x", "sequence_number": number} for number in numbers)


def _said(store: SharedStore, response_id: str) -> list[str]:
    found = store.conversation(response_id)
    assert found is not None
    return [entry.message.content for entry in found.entries]


def forget(store: Any) -> None:
    """As if no server had told of a running response for a minute."""
    with store._database.writing() as connection:
        connection.exec_driver_sql("UPDATE harmonium_responses SET seen = seen - 60")


def test_others_see_how_a_response_comes_along(opener: Opener) -> None:
    first, second = opener(), opener()
    first.put(_body("r1", "queued"), _turn(None, "a"), "ann")
    assert second.events("r1", "ann") is None
    assert first.beat({"r1": Progress(_body("r1", "in_progress"), _events(0, 1))}) == set()
    for _ in range(2):  # where the answer to a beat is lost, it is told again
        assert first.beat({"r1": Progress(_body("r1", "in_progress"), _events(0, 1, 2))}) == set()
    assert second.body("r1", "ann") == _body("r1", "in_progress")
    assert second.events("r1", "ann") == list(_events(0, 1, 2))
    assert second.events("r1", "ann", after=0) == list(_events(1, 2))
    assert second.events("r1", "bob") is None
    assert first.end(_body("r1"), _turn(None, "a"), _events(0, 1, 2, 3))
    assert second.events("r1", "ann", after=1) == list(_events(2, 3))


def test_response_that_nobody_tells_of_has_failed_and_one_that_is_told_of_runs(opener: Opener) -> None:
    first, second = opener(), opener()
    for name in ("r1", "r2"):
        first.put(_body(name, "queued"), _turn(None, name))
    first.beat({"r1": Progress(_body("r1", "in_progress"), _events(0, 1))})
    assert second.body("r1") == _body("r1", "in_progress")
    forget(first)
    assert first.beat({"r2": Progress(_body("r2", "in_progress"))}) == set()
    lost = second.body("r1")
    assert (lost["status"], lost["error"]["code"]) == ("failed", "server_error")
    assert first.body("r1") == lost
    last = {"type": "response.failed", "sequence_number": 2, "response": lost}
    assert first.events("r1") == [*_events(0, 1), last]
    assert second.body("r2") == _body("r2", "in_progress")


def test_response_that_was_given_up_stays_failed_and_its_server_hears_of_it(opener: Opener) -> None:
    first, second = opener(), opener()
    first.put(_body("r1", "in_progress"), _turn(None, "a"))
    forget(first)
    assert second.body("r1")["status"] == "failed"
    assert first.beat({"r1": Progress(_body("r1", "in_progress"), _events(0))}) == {"r1"}
    assert not first.end(_body("r1"), _turn(None, "a", "answer"), _events(0, 1))
    assert first.body("r1")["status"] == "failed"
    assert _said(first, "r1") == ["a"]


def test_nothing_is_given_up_while_the_database_has_just_been_away(opener: Opener) -> None:
    first, second = opener(), opener()
    first.put(_body("r1", "in_progress"), _turn(None, "a"))
    forget(first)
    with pytest.raises(StoreError), second._database.reading() as connection:
        connection.exec_driver_sql("SELECT nothing")  # any failure: its server could not tell of it either
    assert second.body("r1")["status"] == "in_progress"


def test_lost_response_makes_room(opener: Opener) -> None:
    store = opener()
    store._max_responses = 1
    store.put(_body("r1", "in_progress"), _turn(None, "a"))
    forget(store)
    for index in range(33):
        store.put(_body(f"n{index}"), _turn(None, "b"))
    assert store.body("r1") is None


def test_cancel_and_delete_reach_the_server_that_makes_the_response(opener: Opener) -> None:
    first, second = opener(), opener()
    for name in ("r1", "r2", "r3"):
        first.put(_body(name, "queued"), _turn(None, name), "ann")
    progress = {name: Progress(_body(name, "in_progress"), _events(0)) for name in ("r1", "r2", "r3")}
    assert first.beat(progress) == set()
    second.request_cancel("r1", "bob")
    assert not second.delete("r2", "bob")
    assert second.cancel("r3", "bob") is None
    assert first.beat(progress) == set()
    second.request_cancel("r1", "ann")
    assert second.delete("r2", "ann")
    assert first.beat(progress) == {"r1", "r2"}


def test_cancel_needs_no_server(opener: Opener) -> None:
    first, second = opener(), opener()
    first.put(_body("r1", "queued"), _turn(None, "a"), "ann")
    cancelled = second.cancel("r1", "ann")
    assert cancelled == _body("r1", "cancelled")
    assert first.beat({"r1": Progress(_body("r1", "in_progress"))}) == {"r1"}
    assert first.body("r1", "ann") == cancelled
    assert [event["type"] for event in first.events("r1", "ann")] == ["response.incomplete"]
    assert second.cancel("r1", "ann") == cancelled


def test_servers_that_start_at_once_make_one_set_of_tables(shared_url: str) -> None:
    from harmonium.server.shared_store import SharedResponseStore

    start = threading.Barrier(6)
    opened: list[SharedResponseStore] = []
    failures: list[BaseException] = []

    def work() -> None:
        start.wait()
        try:
            opened.append(SharedResponseStore(shared_url))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len({store.seal._key for store in opened}) == 1
    for store in opened:
        store.close()


def test_writers_at_once_lose_nothing(opener: Opener) -> None:
    opener().put(_body("root"), _turn(None, "root"))
    failures: list[BaseException] = []

    def write(name: str, store: SharedStore) -> None:
        try:
            for index in range(8):
                previous = f"{name}{index - 1}" if index else "root"
                store.put(_body(f"{name}{index}"), _turn(previous, f"{name}{index}"))
                if index == 4:
                    store.delete("root")  # all continue it, and one of them is first
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(name, opener())) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    store = opener()
    for name in "abcd":
        assert _said(store, f"{name}7")[-8:] == [f"{name}{index}" for index in range(8)]
    assert len(store) == 32


def test_writer_that_fell_silent_does_not_stop_the_others(
    empty_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harmonium.server import shared_database
    from harmonium.server.shared_store import SharedResponseStore

    silent = SharedResponseStore(empty_postgres_url)
    monkeypatch.setattr(shared_database, "_WAIT_SECONDS", 1)
    with pytest.raises(StoreError), silent._database.writing():
        monkeypatch.setattr(shared_database, "_WAIT_SECONDS", 60)
        other = SharedResponseStore(empty_postgres_url)
        other.put(_body("r1"), _turn(None, "a"))
    assert silent.delete("r1")
    for store in (silent, other):
        store.close()


def test_writer_that_waits_too_long_for_another_is_a_503(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harmonium.server import shared_database

    busy = opener()
    with busy._database.writing():
        monkeypatch.setattr(shared_database, "_WAIT_SECONDS", 1)
        with pytest.raises(ConfigError, match=r"cannot be used: .*(lock timeout|database is locked)"):
            opener()


def test_tables_of_another_version_are_refused(opener: Opener) -> None:
    from sqlalchemy import update

    from harmonium.server.shared_tables import meta

    with opener()._database.writing() as connection:
        connection.execute(update(meta).where(meta.c.name == "version").values(value=b"7"))
    with pytest.raises(ConfigError, match="version 7; this program writes 1"):
        opener()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://me:se%40cret@127.0.0.1:1/x", r"store postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/x"),
        ("postgres://me@127.0.0.1:1/x?password=se%40cret", r"store postgresql\+psycopg://me@127.0.0.1:1/x"),
        ("postgresql://me:se%40cret@127.0.0.1:1/x?sslmode=se%40cret", "cannot be used"),
        ("postgresql://me:se%40cret@127.0.0.1:1/x?nonsense=1", 'invalid connection option "nonsense"'),
        ("postgresql://me:se@cret@127.0.0.1:1/x", "more than one @; one in a password is written %40"),
        ("mysql://me:se%40cret@localhost/x", "is for 'mysql'; expected such as postgresql"),
        ("se@cret", "is no URL of a database"),
        ("postgresql://me:se%40cret@127.0.0.1:port/x", "is no URL of a database"),
        ("sqlite://", "in memory, which no other server sees"),
        ("sqlite:////nowhere/at/all.db", "store sqlite:////nowhere/at/all.db cannot be used: unable to open"),
        ("sqlite:///x.db?nonsense=1", "has parameters"),
    ],
)  # fmt: skip
def test_database_that_cannot_be_used_is_named_without_its_password(
    url: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sqlalchemy")
    if url.startswith("postgres"):
        pytest.importorskip("psycopg")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        open_store(ServerConfig(store_url=url))
    for secret in ("se@cret", "se%40cret", "cret@"):
        assert secret not in str(caught.value)
    assert caught.value.__cause__ is None


def test_no_message_of_the_driver_shows_the_password(shared_url: str) -> None:
    from harmonium.server.shared_database import Database

    database = Database(shared_url)
    database._secrets = ("se%40cret", "se@cret")
    assert database._reason("for se@cret or\n se%40cret") == "for *** or ***"
    database.close()


def test_settings_do_not_show_the_url() -> None:
    assert "cret" not in repr(ServerConfig(store_url="postgresql://me:se%40cret@db/x"))


def test_settings_choose_the_store(tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy")
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    with pytest.raises(ConfigError, match="expected one"):
        ServerConfig(store_path="x.db", store_url=url)
    shared = open_store(ServerConfig(store_url=url))
    assert isinstance(shared, SharedStore)
    shared.close()
    for config in (ServerConfig(), ServerConfig(store_path=str(tmp_path / "x.db"))):
        local = open_store(config)
        assert isinstance(local, ResponseStore)
        assert not isinstance(local, SharedStore)
        local.close()


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    for name in list(sys.modules):
        if name.startswith("harmonium.server.shared_"):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"SQLAlchemy is not installed; pip install 'harmonium\[store\]'"):
        open_store(ServerConfig(store_url="sqlite:///x.db"))


def test_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sqlalchemy")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"driver that is not installed; pip install 'harmonium\[store\]'"):
        open_store(ServerConfig(store_url="postgresql://me@127.0.0.1:1/x"))


def test_database_that_goes_away_is_a_503_and_comes_back() -> None:
    pytest.importorskip("psycopg")
    pytest.importorskip("sqlalchemy")
    why = missing()
    if why is not None:
        pytest.skip(why)
    with postgres() as cluster:
        store = open_store(ServerConfig(store_url=cluster.url))
        store.put(_body("r1"), _turn(None, "a"))
        cluster.stop()
        for _ in range(2):
            with pytest.raises(
                StoreError, match=r"store postgresql\+psycopg://harmonium@/postgres cannot"
            ) as caught:
                store.body("r1")
        assert caught.value.status == 503
        with pytest.raises(StoreError):
            store.put(_body("r2"), _turn("r1", "b"))
        cluster.start()
        assert store.body("r1") == _body("r1")
        store.put(_body("r2"), _turn("r1", "b"))
        assert store.body("r2") == _body("r2")
        store.close()
