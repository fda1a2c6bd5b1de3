"""The system calls that judged code may make, as a filter program for the Linux kernel (seccomp(2)).

Everything that is not listed fails with EPERM: sockets, new processes and threads, signals to others, every
call that makes, changes or removes a file. Files may be opened for reading alone, since Python imports
modules by reading. The list is what CPython needs to compute: memory, time, locks, reading.

Source of the numbers: the kernel's headers asm/unistd_64.h (x86-64) and asm-generic/unistd.h (aarch64); of
the program's form: linux/filter.h, linux/seccomp.h, linux/audit.h.
"""

from __future__ import annotations

import errno
import platform
import struct

CALLS: dict[str, tuple[int, int | None]] = {
    # name: (x86-64, aarch64)
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "pread64": (17, 67), "close": (3, 57),
    "fstat": (5, 80), "stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "lseek": (8, 62), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17), "getdents64": (217, 61),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214), "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "exit": (60, 93), "exit_group": (231, 94), "getrandom": (318, 278),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165),
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "uname": (63, 160), "sysinfo": (99, 179), "getrlimit": (97, 163),
}  # fmt: skip

OPENING: dict[str, tuple[int, int | None, int]] = {
    # name: (x86-64, aarch64, which argument holds the flags)
    "open": (2, None, 1),
    "openat": (257, 56, 2),
}

WRITE_FLAGS = 0o1 | 0o2 | 0o100 | 0o1000
"""O_WRONLY, O_RDWR, O_CREAT, O_TRUNC: the same on both machines (O_TMPFILE needs one of the first two)."""

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Name of the machine: (column of the tables above, AUDIT_ARCH_*)."""

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
_NUMBER_OFFSET, _MACHINE_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16


def filter_program(machine: str | None = None) -> bytes | None:
    """The filter as the kernel reads it (8 bytes an instruction); None on a machine that is not listed.

    machine: as platform.machine() names it; None: this one.
    """
    known = MACHINES.get(platform.machine() if machine is None else machine)
    if known is None:
        return None
    column, audit_arch = known
    steps = [
        (_LOAD, 0, 0, _MACHINE_OFFSET),
        (_EQUAL, 1, 0, audit_arch),
        (_RETURN, 0, 0, _KILL),  # 32-bit calls have other numbers
        (_LOAD, 0, 0, _NUMBER_OFFSET),
    ]
    for numbers in CALLS.values():
        number = numbers[column]
        if number is not None:
            steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for *opening, argument in OPENING.values():
        number = opening[column]
        if number is not None:
            steps += [
                (_EQUAL, 0, 4, number),
                (_LOAD, 0, 0, _ARGUMENTS_OFFSET + 8 * argument),  # the low half: little-endian machines
                (_ANY_BIT, 1, 0, WRITE_FLAGS),
                (_RETURN, 0, 0, _ALLOW),
                (_RETURN, 0, 0, _REFUSE),
            ]
    steps.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("<HBBI", *step) for step in steps)
