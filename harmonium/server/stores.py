"""Which store the settings mean: a file or the memory of one server, or a database that several share."""

from __future__ import annotations

from harmonium.errors import ConfigError
from harmonium.server.config import ServerConfig
from harmonium.server.store import ResponseStore
from harmonium.server.store_records import Store


def open_store(config: ServerConfig) -> Store:
    """The store in `store_path`, or in the database of `store_url`; with neither, in memory until the end.

    Raises ConfigError for what cannot be used, and for a URL without the extra [store].
    """
    if config.store_url is None:
        return ResponseStore(config.store_path)
    try:
        from harmonium.server.shared_store import SharedResponseStore  # here: SQLAlchemy is an extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sqlalchemy":
            raise
        raise ConfigError(
            "--store-url is given and SQLAlchemy is not installed; pip install 'harmonium[store]'"
        ) from None
    return SharedResponseStore(config.store_url)
