"""The command as a child process: closed streams, a full disk, Ctrl-C, a reader that leaves."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import harmonium
from harmonium.testing import make_tiny_checkpoint
from tests.scripted_chat import FINAL, gen

_PACKAGE_PARENT = str(Path(harmonium.__file__).parent.parent)
"""Where children find the package that is tested here, installed or not."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint, small because its vocabulary is."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("cli") / "model", vocabulary_size=512)


@pytest.mark.parametrize(
    ("words", "closed", "code"),
    [
        ("inspect {}", ">&-", 0),
        ("generate {} --prompt a --max-tokens 1", "<&- >&- 2>&-", 0),
        ("chat {} -", "<&-", 2),
        ("chat {}", "<&-", 0),
        ("chat {} hello", ">&-", 2),
        ("nonsense", "2>&-", 2),
    ],
)
def test_closed_standard_streams_are_met_without_a_traceback(
    words: str, closed: str, code: int, model: Path
) -> None:
    command = (
        f"{shlex.quote(sys.executable)} -m harmonium.cli {words.format(shlex.quote(str(model)))} {closed}"
    )
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=_PACKAGE_PARENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "harmonium:" not in done.stdout
    assert done.returncode == code, done.stderr


def test_full_disk_behind_stdout_is_one_line_and_exit_code_1(model: Path) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "harmonium.cli", "inspect", str(model)],
            cwd=_PACKAGE_PARENT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "harmonium: No space left on device\n")


_CHILD = """
import sys
from harmonium import cli, loading
from harmonium.engine.scripted import ScriptedEngine
loading.load_engine = lambda path, config: ScriptedEngine([{tokens}], seconds_per_event=0.002)
sys.exit(cli.main(["chat", "x", "Hello"]))
"""


def _run_python(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=_PACKAGE_PARENT,
        env={**os.environ, "PYTHONPATH": _PACKAGE_PARENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _child() -> subprocess.Popen[bytes]:
    return _run_python(_CHILD.format(tokens=gen(FINAL.format("word " * 5000))))


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """A job in the background ignores SIGINT, and its children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
def test_interrupted_answer_ends_with_130_and_no_traceback() -> None:
    with _child() as child:
        assert child.stdout is not None
        assert child.stdout.read(5) == b"word "
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (130, b"")


def test_closed_pipe_ends_quietly() -> None:
    with _child() as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.read(5) == b"word "
        child.stdout.close()
        started = time.monotonic()
        assert child.wait(timeout=20) == 141
        assert child.stderr.read() == b""
        assert time.monotonic() - started < 10


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from harmonium.cli import main; main(['--help']);"
        "print([name for name in ('numpy', 'rich', 'prompt_toolkit', 'tiktoken', 'harmonium._native')"
        " if name in sys.modules], file=sys.stderr)"
    )
    with _run_python(code) as child:
        _, err = child.communicate(timeout=20)
    assert err.decode().strip() == "[]"
