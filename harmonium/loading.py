"""From the word MODEL on the command line to a running engine, with a progress bar where somebody watches."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from harmonium.checkpoint.shards import model_name
from harmonium.config import EngineConfig
from harmonium.demo import demo_checkpoint_path
from harmonium.engine.create import create_engine
from harmonium.engine.protocol import Engine
from harmonium.errors import ConfigError
from harmonium.options import DEMO, near
from harmonium.testing import tiny_checkpoint_path
from harmonium.text_file import expand_home

if TYPE_CHECKING:
    from harmonium.hub import HubName, HubSettings

TINY = "tiny"

__all__ = ["find_model", "load_engine", "model_name", "model_to_inspect", "progress_bar", "pull_model"]


def find_model(word: str) -> Path:
    """The checkpoint's folder. `demo` unpacks the package's model into the user's cache, once; `tiny` makes a
    small random one there; the name of a model on a hub is looked for on this machine, else downloaded;
    `ollama:NAME` and `lmstudio:NAME` are what those programs keep.

    Says on stderr that the tiny model is random, and what is downloaded. Raises CheckpointError when the demo
    model is damaged, ConfigError when the cache cannot be written, and for a path that does not exist beside
    one of nearly that name; HubError for a download that fails; whether a folder holds a model is found out
    by opening it.
    """
    if word == DEMO:
        return demo_checkpoint_path()
    if word == TINY:
        return _tiny()
    if word.startswith(("ollama:", "lmstudio:")):
        from harmonium.hub.others import find_elsewhere

        elsewhere = find_elsewhere(word)
        assert elsewhere is not None, "both prefixes are known there"
        return elsewhere
    found = _hub_name(word)
    if found is None:
        return _path(word)
    from harmonium.hub import find_local, pull

    return find_local(*found) or pull(*found)


@contextmanager
def model_to_inspect(word: str) -> Generator[tuple[Path, str | None], None, None]:
    """The checkpoint's folder, and what to call it in place of its path.

    Of a model that is on a hub and not here, the headers alone are fetched, into a folder that goes at the
    end. Raises what `find_model` raises.
    """
    found = None if word in (DEMO, TINY) else _hub_name(word)
    if found is None:
        yield find_model(word), None
        return
    from harmonium.hub import find_local, skeleton
    from harmonium.hub.notices import size_text

    local = find_local(*found)
    if local is not None:
        yield local, None
        return
    with skeleton(*found) as headers:
        yield headers.folder, f"{found[0]}, not here yet: {size_text(headers.download_bytes)} to download"


def pull_model(arguments: argparse.Namespace) -> Path:
    """`harmonium pull`: make the newest version of a model be on this machine; its folder.

    Raises ConfigError for a word that no hub has models under, HubError, CheckpointError.
    """
    from harmonium.hub import PullOptions, checked_source, hub_settings, parse_name, pull

    settings = hub_settings()
    source = checked_source(arguments.source or "", "--source") or settings.source
    name = parse_name(arguments.model, source, arguments.revision)
    if name is None:
        raise ConfigError(f"{arguments.model!r} names no model; expected such as openai/gpt-oss-20b or 20b")
    if settings.remark is not None and arguments.source is None:
        print(f"harmonium: {settings.remark}", file=sys.stderr)
    folder = None if arguments.dir is None else expand_home(arguments.dir)
    return pull(name, settings, PullOptions(arguments.original, arguments.token, folder))


def _hub_name(word: str) -> tuple[HubName, HubSettings] | None:
    """What a word that is no path here means on a hub, told which switch is ours where vLLM's is set."""
    path = expand_home(word)
    try:
        if not word or path.exists() or path.is_symlink():
            return None
    except (OSError, ValueError):
        return None  # whoever opens the path says it better
    from harmonium.hub import hub_settings, may_be_path, parse_name

    if may_be_path(word):
        return None
    settings = hub_settings()
    name = parse_name(word, settings.source)
    if name is None:
        return None
    if settings.remark is not None:
        print(f"harmonium: {settings.remark}", file=sys.stderr)
    return name, settings


def _path(word: str) -> Path:
    if not word:
        raise ConfigError("the model's path is empty")
    path = expand_home(word)
    _suggest_neighbor(word, path)
    return path


def _tiny() -> Path:
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
