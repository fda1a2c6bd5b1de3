"""A database that several servers share: reached by a URL, prepared, and asked in transactions.

    database = Database("postgresql://harmonium@db/harmonium")
    with database.reading() as connection: ...      # sees what others have committed
    with database.writing() as connection: ...      # one writer at a time, over all servers

The password of a URL appears in no name and no message.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, quote_plus

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    create_engine,
    event,
    insert,
    literal_column,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from harmonium.errors import ConfigError, StoreError
from harmonium.server.shared_tables import VERSION, meta, metadata
from harmonium.server.store_threads import NUM_THREADS

_DRIVERS = {
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",  # as hosting services write it
    "postgresql+psycopg": "postgresql+psycopg",
    "sqlite": "sqlite",
}
_EXPECTED = "expected such as postgresql://USER@HOST/NAME or sqlite:///FILE"

_WAIT_SECONDS = 10
"""How long a call waits for a free connection, another writer, or bytes from a database that went silent; how
long a writer may be silent until the others go on without it."""

_LOCK_KEY = 0x6861726D6F6E6975  # "harmoniu": of the advisory lock that writers take

_TIMEOUTS = ("lock_timeout", "idle_in_transaction_session_timeout")
"""Of PostgreSQL. Without the second one a writer whose machine died would keep the lock for hours."""

_CLOCKS = {
    "postgresql": "extract(epoch FROM clock_timestamp())",
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
}


class Database:
    """A database that was reached, with our tables in it. Any thread may use it.

    name: its URL without password and parameters. clock: seconds since 1970 as an SQL expression, by the
    database's clock, because those of the servers may differ. failed_at: when (`time.monotonic`) it last
    failed, None: never.
    """

    def __init__(self, url: str) -> None:
        """Reach it and make the tables. Raises ConfigError when it cannot be used."""
        parsed = _parse(url)
        self.name = _name(parsed)
        self.failed_at: float | None = None
        self._secrets = _secrets(parsed)
        try:
            self._engine = _engine(parsed)
        except ImportError:
            raise ConfigError(
                f"store {self.name} needs a driver that is not installed; pip install 'harmonium[store]'"
            ) from None
        self.clock = literal_column(_CLOCKS[self._engine.dialect.name])
        self._writer = self._engine.execution_options(is_writing=True)  # over the same connections
        try:
            with self.writing() as connection:
                self._prepare(connection)
        except StoreError as error:
            self._engine.dispose()
            raise ConfigError(str(error)) from None
        except BaseException:
            self._engine.dispose()
            raise

    def _prepare(self, connection: Connection) -> None:
        """Alone among writers, so that of two servers that start at once one makes the tables."""
        metadata.create_all(connection)
        found = connection.scalar(select(meta.c.value).where(meta.c.name == "version"))
        if found is None:
            connection.execute(insert(meta).values(name="version", value=str(VERSION).encode()))
        elif bytes(found) != str(VERSION).encode():
            raise ConfigError(
                f"store {self.name} has tables of version {bytes(found).decode()}; "
                f"this program writes {VERSION}"
            )

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for queries. Raises StoreError when the database fails."""
        with self._told(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction, alone among writers; committed at the end. Raises StoreError.

        Rows are few and small, so that waiting for each other costs less than reasoning about what two
        writers may see of a conversation that one continues and the other deletes.
        """
        with self._told(), self._writer.begin() as connection:
            if connection.dialect.name == "postgresql":
                # One statement: the limits hold for the lock that is taken behind them.
                limits = (f"set_config('{name}', '{_WAIT_SECONDS}s', true)" for name in _TIMEOUTS)
                connection.execute(text(f"SELECT {', '.join(limits)}, pg_advisory_xact_lock({_LOCK_KEY})"))
            yield connection

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Failures of the database as StoreError."""
        try:
            yield
        except SQLAlchemyError as error:
            self.failed_at = time.monotonic()
            cause = error.orig if isinstance(error, DBAPIError) else error
            raise StoreError(f"store {self.name} cannot be used: {self._reason(cause)}") from None

    def _reason(self, cause: object) -> str:
        reason = " ".join(str(cause).split())
        for secret in self._secrets:
            reason = reason.replace(secret, "***")
        return reason[:300]

    def close(self) -> None:
        """Close the connections. A second call does nothing."""
        self._engine.dispose()


def _parse(url: str) -> URL:
    """Raises ConfigError for a URL of no database that we know."""
    if url.count("@") > 1:  # the rest of the password would be taken for the host, and shown
        raise ConfigError("--store-url holds more than one @; one in a password is written %40")
    try:
        parsed = make_url(url)
    except (SQLAlchemyError, ValueError):
        raise ConfigError(f"--store-url is no URL of a database; {_EXPECTED}") from None
    driver = _DRIVERS.get(parsed.drivername)
    if driver is None:
        raise ConfigError(f"--store-url is for {parsed.drivername[:40]!r}; {_EXPECTED}")
    if driver == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigError(f"--store-url is a database in memory, which no other server sees; {_EXPECTED}")
    if driver == "sqlite" and parsed.query:
        raise ConfigError(f"--store-url has parameters, which SQLite has not here; {_EXPECTED}")
    return parsed.set(drivername=driver)


def _name(url: URL) -> str:
    """The URL for people: no password, and no parameters, which may hold one."""
    return str(url.set(query={}).render_as_string(hide_password=True))


def _secrets(url: URL) -> tuple[str, ...]:
    """What must not be shown, in every spelling. Longest first: one may be part of another."""
    found = [str(url.password or "")]
    for name, value in url.query.items():
        if "pass" in name:
            found += [value] if isinstance(value, str) else list(value)
    spelled = {spelling for word in found if word for spelling in (word, quote(word), quote_plus(word))}
    return tuple(sorted(spelled, key=len, reverse=True))


def _engine(url: URL) -> Engine:
    is_sqlite = url.drivername == "sqlite"
    options = _sqlite_options() if is_sqlite else _postgresql_options()
    engine = create_engine(
        url,
        connect_args={name: value for name, value in options.items() if name not in url.query},
        # What a reader sees under any other level, or a writer that waited for its turn, may be old.
        isolation_level=None if is_sqlite else "READ COMMITTED",
        pool_size=NUM_THREADS,
        max_overflow=0,
        pool_timeout=_WAIT_SECONDS,
        pool_pre_ping=True,  # a database that was restarted is reached again by the next call
        hide_parameters=True,
    )
    if is_sqlite:
        _prepare_sqlite(engine)
    return engine


def _postgresql_options() -> dict[str, Any]:
    """Source: libpq's parameter key words, and psycopg's for statements that it prepares."""
    return {
        "connect_timeout": _WAIT_SECONDS // 2,
        "keepalives_idle": _WAIT_SECONDS // 2,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": _WAIT_SECONDS * 1000,
        "prepare_threshold": None,  # a pooler in between may give each transaction another connection
        "application_name": "harmonium",
    }


def _sqlite_options() -> dict[str, Any]:
    return {"timeout": _WAIT_SECONDS, "check_same_thread": False, "isolation_level": None}


def _prepare_sqlite(engine: Engine) -> None:
    """Transactions that begin when we say so: left to itself the driver begins them too late."""

    def connect(connection: Any, record: object) -> None:
        _use_wal(connection)
        connection.execute("PRAGMA synchronous = NORMAL")

    def begin(connection: Connection) -> None:
        is_writing = connection.get_execution_options().get("is_writing", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")

    event.listen(engine, "connect", connect)
    event.listen(engine, "begin", begin)


def _use_wal(connection: sqlite3.Connection) -> None:
    """Readers and a writer at once. To set it does not wait for other servers that do, as a write would."""
    end = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
        time.sleep(0.02)
