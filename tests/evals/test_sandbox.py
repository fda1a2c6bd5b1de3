"""Code of a model reaches neither the network, nor files, nor other processes, and ends in time."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path

import pytest

from harmonium.errors import ConfigError
from harmonium.evals import sandbox, seccomp
from harmonium.evals.sandbox import check_sandbox, run_confined


@pytest.fixture(scope="module", autouse=True)
def confined() -> None:
    try:
        check_sandbox()
    except ConfigError as error:
        pytest.skip(str(error))


def reason(code: str, seconds: float = 5.0) -> str:
    outcome = run_confined(code, seconds)
    assert not outcome.passed
    return outcome.reason


def test_code_that_ends_passes_and_may_import() -> None:
    code = "import math, re, collections, itertools, heapq, random, decimal, functools, string, typing\n"
    assert run_confined(code + "assert sorted([2, 1]) == [1, 2]\nprint('x' * 10**6)", 5.0).passed


def test_code_that_fails_says_how() -> None:
    assert reason("assert 1 == 2, 'one is not two'") == "AssertionError: one is not two"
    assert reason("def f(:").startswith("SyntaxError")
    assert reason("def f(): return f()\nf()").startswith("RecursionError")


@pytest.mark.parametrize(
    "code", ["import sys; sys.exit(0)", "exit = quit = None\nraise SystemExit", "import os; os._exit(0)"]
)
def test_leaving_early_is_no_pass(code: str) -> None:
    assert reason(code)


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"])
def test_no_socket_can_be_made(family: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        code = f"""
import socket
s = socket.socket(socket.{family}, socket.SOCK_STREAM)
s.connect(('127.0.0.1', {port}))
"""
        assert "PermissionError" in reason(code)
        listener.settimeout(0.05)
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize(
    "attempt",
    [
        "open({path!r}, 'w').write('x')",
        "open({path!r}, 'a')",
        "open({path!r}, 'r+')",
        "os.open({path!r}, os.O_CREAT)",
        "os.open({path!r}, os.O_RDONLY | os.O_TRUNC)",
        "os.unlink({path!r})",
        "os.rename({path!r}, {path!r} + '2')",
        "os.truncate({path!r}, 0)",
        "os.chmod({path!r}, 0)",
        "os.mkdir({path!r} + 'd')",
        "os.symlink('/', {path!r} + 's')",
        "os.link({path!r}, {path!r} + 'l')",
        "os.utime({path!r})",
        "os.memfd_create('m')",
    ],
)
def test_no_file_is_made_changed_or_removed(tmp_path: Path, attempt: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    before = (victim.stat().st_mode, victim.stat().st_mtime_ns, sorted(tmp_path.iterdir()))
    assert "PermissionError" in reason("import os\n" + attempt.format(path=str(victim)))
    assert victim.read_text() == "mine"
    assert (victim.stat().st_mode, victim.stat().st_mtime_ns, sorted(tmp_path.iterdir())) == before


@pytest.mark.parametrize(
    "attempt",
    [
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.system('true') and exec('raise PermissionError')",
        "import subprocess; subprocess.run(['/bin/true'])",
        "os.kill(os.getppid(), 9)",
        "os.setuid(0) or os.setgid(0)",
        "os.chroot('/')",
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1, 1))",
    ],
)
def test_no_process_is_started_or_touched(attempt: str) -> None:
    said = reason("import os\n" + attempt)
    assert "PermissionError" in said or "Operation not permitted" in said or "limit" in said, said


def test_native_calls_are_filtered_too() -> None:
    """What goes past Python, through ctypes, meets the same filter: socket(2) is number 41 or 198."""
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
number = {"x86_64": 41, "aarch64": 198}[os.uname().machine]
assert libc.syscall(number, 2, 1, 0) == -1 and ctypes.get_errno() == 1
assert libc.syscall(0x40000000 + number, 2, 1, 0) == -1  # the x32 numbers
"""
    assert run_confined(code, 5.0).passed, reason(code)


def test_endless_code_is_stopped() -> None:
    started = time.monotonic()
    assert reason("while True: pass", 1.0) == "stopped after 1 s"
    assert time.monotonic() - started < sandbox.START_SECONDS + 5


def test_sleeping_code_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "START_SECONDS", 0.5)
    assert reason("import time; time.sleep(1000)", 0.5) == "stopped after 0.5 s"


def test_memory_is_limited() -> None:
    assert "MemoryError" in reason(f"x = bytearray({2 * sandbox.MEMORY_BYTES})")


def test_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARMONIUM_API_KEY", "sk-secret")
    assert run_confined("import os; assert 'HARMONIUM_API_KEY' not in os.environ", 5.0).passed


def test_machine_without_a_filter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(ConfigError, match="runs code that the model wrote"):
        check_sandbox()


def test_filter_that_lets_something_through_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(seccomp.CALLS, "socket", (41, 198))
    with pytest.raises(ConfigError, match="network"):
        check_sandbox()


def test_numbers_are_those_of_the_kernels_headers() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.is_file():
        pytest.skip("no kernel headers here")
    theirs = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    ours = {name: numbers[0] for name, numbers in {**seccomp.CALLS, **seccomp.OPENING}.items()}
    assert ours == {name: int(theirs[name]) for name in ours}


def test_flags_are_those_of_this_machine() -> None:
    assert os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC == seccomp.WRITE_FLAGS
