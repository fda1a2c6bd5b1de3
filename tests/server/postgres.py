"""A PostgreSQL of its own for a test, from the system's package where there is one."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUPERUSER = "harmonium"


def missing() -> str | None:
    """Why there is none here; None where there is."""
    if _programs() is None:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    if os.getuid() == 0 and _account() is None:
        return "PostgreSQL does not run as root, and there is no user postgres or nobody"
    return None


class Postgres:
    """A database cluster in a folder of its own. url: of its empty database, while it runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._account = _account() if os.getuid() == 0 else None
        if self._account is not None:
            os.chown(folder, self._account.pw_uid, self._account.pw_gid)
        # No port: a socket in the folder is nobody else's.
        self.url = f"postgresql://{SUPERUSER}@/postgres?host={folder}"
        self._run("initdb", "-U", SUPERUSER, "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")

    def start(self) -> None:
        """Returns when it answers."""
        settings = {
            "listen_addresses": "''",
            "unix_socket_directories": str(self._folder),
            "fsync": "off",
            "shared_buffers": "16MB",
        }
        options = " ".join(f"-c {name}={value}" for name, value in settings.items())
        self._run("pg_ctl", "-w", "-t", "60", "-l", str(self._folder / "log"), "-o", options, "start")

    def stop(self) -> None:
        """As when it crashes: whoever is connected is cut off."""
        self._run("pg_ctl", "-w", "-t", "60", "-m", "immediate", "stop")

    def _run(self, program: str, *words: str) -> None:
        programs = _programs()
        assert programs is not None, missing()
        subprocess.run(
            [str(programs / program), "-D", str(self._folder / "data"), *words],
            user=None if self._account is None else self._account.pw_uid,
            group=None if self._account is None else self._account.pw_gid,
            extra_groups=None if self._account is None else [],
            cwd=self._folder,
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=120,
        )


@contextmanager
def postgres() -> Iterator[Postgres]:
    """One that runs, and ends with the block."""
    folder = Path(
        tempfile.mkdtemp(prefix="harmonium-pg-", dir="/tmp")
    )  # a socket's path has 107 bytes at most
    try:
        cluster = Postgres(folder)
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path | None:
    """The folder of initdb and pg_ctl; Debian keeps it off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    if on_path is not None:
        found.append(Path(on_path))
    return found[-1].resolve().parent if found else None


def _account() -> pwd.struct_passwd | None:
    """Whom to run it as where we are root."""
    known = {account.pw_name: account for account in pwd.getpwall()}
    return known.get("postgres") or known.get("nobody")
