"""The tables of a store that several servers share (extra [store])."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
)

VERSION = 1
"""Of the tables; stored in `meta`. A program refuses tables of another version."""

metadata = MetaData()

_Number = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows only where the type is INTEGER

meta = Table(
    "harmonium_meta", metadata, Column("name", String, primary_key=True), Column("value", LargeBinary)
)

turns = Table(
    "harmonium_turns",
    metadata,
    Column("turn_id", _Number, primary_key=True, autoincrement=True),
    Column("parent", _Number, index=True),
    Column("date", String),
    Column("input_items", LargeBinary, nullable=False),
    Column("entries", LargeBinary, nullable=False),
)

# used: when it was last part of a request; seen: when its server last told of it while it ran. Both in
# seconds since 1970 by the database's clock.
responses = Table(
    "harmonium_responses",
    metadata,
    Column("response_id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("turn_id", _Number, nullable=False, index=True),
    Column("used", Double, nullable=False),
    Column("seen", Double, nullable=False),
    Column("status", String, nullable=False),
    Column("is_cancelled", Boolean, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("size", _Number, nullable=False),
    Index("harmonium_responses_by_use", "used"),
)

# The stream of a background response in pieces: those with sequence numbers up to last_number, behind the
# piece before it.
events = Table(
    "harmonium_events",
    metadata,
    Column("response_id", String, primary_key=True),
    Column("last_number", _Number, primary_key=True, autoincrement=False),
    Column("events", LargeBinary, nullable=False),
)

# What a later request may refer to.
items = Table(
    "harmonium_items",
    metadata,
    Column("item_id", String, nullable=False, index=True),
    Column("turn_id", _Number, nullable=False, index=True),
)
