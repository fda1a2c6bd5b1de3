"""From the word MODEL on the command line to a running engine, with a progress bar where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from harmonium.config import EngineConfig
from harmonium.demo import demo_checkpoint_path
from harmonium.engine.create import create_engine
from harmonium.engine.protocol import Engine
from harmonium.errors import ConfigError
from harmonium.options import DEMO, near
from harmonium.testing import tiny_checkpoint_path
from harmonium.text_file import expand_home

TINY = "tiny"


def find_model(word: str) -> Path:
    """The checkpoint's folder. `demo` unpacks the package's model into the user's cache, once; `tiny` makes a
    small random one there.

    Says on stderr that the tiny model is random. Raises CheckpointError when the demo model is damaged,
    ConfigError when the cache cannot be written, and for
    a path that does not exist beside one of nearly that name; whether a folder holds a model is found out by
    opening it.
    """
    if word == DEMO:
        return demo_checkpoint_path()
    if word != TINY:
        if not word:
            raise ConfigError("the model's path is empty")
        path = expand_home(word)
        _suggest_neighbor(word, path)
        return path
    print(
        "tiny: a small model with random weights, for trying the commands; what it says is gibberish",
        file=sys.stderr,
    )
    return tiny_checkpoint_path()


def _suggest_neighbor(word: str, path: Path) -> None:
    try:
        if path.exists():
            return
        neighbors = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except (OSError, ValueError):
        return  # whoever opens the path says it better
    meant = near(path.name, neighbors if path.parent != Path() else [*neighbors, DEMO, TINY])
    if meant:
        raise ConfigError(f"no model {word!r}{meant}")


def load_engine(path: Path, config: EngineConfig) -> Engine:
    """Load the model. Raises what `create_engine` raises."""
    with progress_bar(f"loading {path.name}") as progress:
        return create_engine(path, config, progress=progress)


@contextmanager
def progress_bar(title: str) -> Generator[Callable[[int, int], None] | None, None, None]:
    """A function to be called with (bytes done, bytes in all); None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # here: a pipe need not wait for it
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
