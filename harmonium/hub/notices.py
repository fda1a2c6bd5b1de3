"""What a download tells the person who waits for it, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from harmonium.hub.transfer import Progress

_LINES = 10
"""Lines of progress where nobody looks at a terminal."""

Say = Callable[[str], None]


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def size_text(size_bytes: int) -> str:
    """'13.79 GB', '2.5 MB' or '812 bytes', in powers of ten as disks are sold."""
    if size_bytes >= 10**9:
        return f"{size_bytes / 1e9:.2f} GB"
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 10**6 else f"{size_bytes:,} bytes"


@contextmanager
def download_bar(title: str) -> Iterator[Progress]:
    """A bar with speed and time left on a terminal; elsewhere a line at each tenth."""
    if not sys.stderr.isatty():
        yield _lines(title)
        return
    from rich.console import Console  # here: a pipe need not wait for it
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _lines(title: str) -> Progress:
    tenth = -1

    def progress(done: int, total: int) -> None:
        nonlocal tenth
        now = done * _LINES // total if total else _LINES
        if now > tenth:
            tenth = now
            say(f"{title}: {size_text(done)} of {size_text(total)}")

    return progress
