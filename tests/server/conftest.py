"""The API's tests, once over the engine that they make and once over `--engine vllm=` in front of it.

Databases for the tests of stores: SQLite through SQLAlchemy, and PostgreSQL where its programs are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.postgres import missing, postgres
from tests.server.remote_states import StubServer, remote_states

OVER_VLLM = frozenset(
    {
        "test_anthropic_client",
        "test_chat_faults",
        "test_chat_grammar",
        "test_completions",
        "test_disconnect",
        "test_fault_variations",
        "test_messages",
        "test_messages_faults",
        "test_openai_client",
        "test_responses",
        "test_responses_client",
        "test_responses_faults",
        "test_responses_grammar",
        "test_responses_run",
        "test_responses_tools",
    }
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.module.__name__.rpartition(".")[2]
    if name in OVER_VLLM:
        metafunc.parametrize("engine_kind", ["own", "vllm"], indirect=True)


@pytest.fixture(scope="session")
def stub_server() -> Iterator[StubServer]:
    server = StubServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def engine_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """ "own": the engine that the test makes. "vllm": vLLM's protocol lies between it and the server."""
    kind: str = getattr(request, "param", "own")
    if kind == "vllm":
        remote_states(monkeypatch, request.getfixturevalue("stub_server"))
    return kind


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL that runs. Skips where there is none."""
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("psycopg")
    why = missing()
    if why is not None:
        pytest.skip(why)
    with postgres() as cluster:
        yield cluster.url


@pytest.fixture(params=["sqlite", "postgresql"])
def shared_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database that several servers can share."""
    return empty_database(request, request.param, tmp_path)


@pytest.fixture
def empty_postgres_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of PostgreSQL."""
    return empty_database(request, "postgresql", tmp_path)


def empty_database(request: pytest.FixtureRequest, kind: str, folder: Path) -> str:
    """The URL of one; "sqlite" in the folder, "postgresql" in the one cluster of all tests."""
    pytest.importorskip("sqlalchemy")
    if kind == "sqlite":
        return f"sqlite:///{folder / 'shared.db'}"
    url: str = request.getfixturevalue("postgres_url")
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return url
