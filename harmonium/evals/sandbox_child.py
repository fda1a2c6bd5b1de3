"""Runs as a program of its own, with nothing but the standard library: sandbox.py starts it and says why.

Arguments: the filter program in hexadecimal, CPU seconds, bytes of memory. stdin: the code, as UTF-8. On
stdout: one JSON object when the code came to an end by itself, nothing when it was stopped.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def limit(cpu_seconds: int, memory_bytes: int) -> None:
    """Limits that the code cannot raise again."""
    for kind, amount in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(kind, (amount, amount))


def confine(program: bytes) -> None:
    """Install the filter for the rest of this process. Raises OSError when the kernel refuses it."""
    libc = ctypes.CDLL(None, use_errno=True)
    steps = ctypes.create_string_buffer(program, len(program))
    filter_program = _Program(len(program) // 8, ctypes.cast(steps, ctypes.c_void_p))
    zero = ctypes.c_ulong(0)
    for call in (
        (PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), zero, zero, zero),
        (PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero),
        (PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(filter_program), zero, zero),
    ):
        if libc.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main() -> None:
    program, cpu_seconds, memory_bytes = bytes.fromhex(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    code = sys.stdin.buffer.read().decode("utf-8", "replace")
    result = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # what the code prints is nobody's business
        os.dup2(null, descriptor)
    error = None
    limit(cpu_seconds, memory_bytes)
    confine(program)
    try:
        exec(compile(code, "answer", "exec"), {"__name__": "__main__"})
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"[:500]
    os.write(result, json.dumps({"error": error}).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
