#!/usr/bin/env python3
"""Did a kernel become slower? Counts the instructions of each, which noise does not move.

    python benchmarks/instructions.py            compares with instructions.json beside this file
    python benchmarks/instructions.py --write    renews that file: after a change that is meant

Runs every kernel of kernel_cases.py once, on one thread, under `valgrind --tool=callgrind`, and counts what
the native module executes; Python and NumPy around it do not count. Valgrind knows no AVX-512, so the counts
are of the AVX2 and the scalar kernels, and of the drivers, which all share. A count is of one compiler: with
another one nothing is compared. Exit code 1 when a kernel executes over 3 % more than written down, 2 when
nothing can be counted or compared here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WRITTEN = Path(__file__).with_name("instructions.json")
TOLERANCE, CALL = 0.03, 500
"""The share by which a count may grow, and what the bindings around any call may take more."""

ISA_NAMES = ("scalar", "avx2")

# Two calls of the C library that nothing else makes here: callgrind counts from one and writes at the other.
START, STOP = "getppid", "getpgrp"


class CannotCount(Exception):
    """Instructions cannot be counted, or not compared, on this machine; says why."""


class CountFailed(Exception):
    """Valgrind is there and did not do what it should."""


def run_cases() -> None:
    """Inside valgrind: name of each case to standard output, its count to callgrind's next file."""
    from kernel_cases import all_cases

    from harmonium.kernels import runtime

    for isa in ISA_NAMES:
        if isa not in runtime.supported_isa():
            continue
        runtime.configure(isa, 1)
        for name, run in all_cases():
            run()  # scratch memory and tables are there from now on
            os.getppid()
            run()
            os.getpgrp()
            print(f"{isa}: {name}", flush=True)


def count() -> dict[str, int]:
    """Instructions by "isa: case". Raises CannotCount without valgrind, CountFailed when it fails."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise CannotCount("valgrind is not installed")
    with tempfile.TemporaryDirectory() as folder:
        command = [valgrind, "--tool=callgrind", f"--callgrind-out-file={folder}/out"]
        command += [f"--zero-before={START}", f"--dump-before={STOP}", sys.executable]
        done = subprocess.run(
            [*command, str(Path(__file__).resolve()), "--inside"],
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
            # One of OpenBLAS's threads would be one more thing for valgrind to schedule.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        )
        if done.returncode != 0:
            raise CountFailed(f"valgrind ended with {done.returncode}: {done.stderr[-1000:]}")
        names = done.stdout.splitlines()
        files = [Path(folder, f"out.{number}") for number in range(1, len(names) + 1)]
        if not names or not all(file.is_file() for file in files):
            raise CountFailed(
                f"valgrind wrote {len(list(Path(folder).iterdir()))} files for {len(names)} cases"
            )
        return {name: native_cost(file.read_text()) for name, file in zip(names, files, strict=True)}


def native_cost(dump: str) -> int:
    """Instructions that our module executed itself, of a file in callgrind's format.

    Source: the Callgrind Format Specification of Valgrind's manual. Names are "(number) name" once, then
    "(number)"; the line after "calls=" is the cost of what was called, which stands again where it was spent.
    """
    objects: dict[str, str] = {}
    current, total, is_inclusive = "", 0, False
    for line in dump.splitlines():
        if match := re.match(r"c?ob=(\(\d+\))(?: (.*))?$", line):
            if match[2] is not None:
                objects[match[1]] = match[2]
            if line.startswith("ob="):
                current = objects[match[1]]
        elif line.startswith("calls="):
            is_inclusive = True
        elif line[:1] in "0123456789+-*" and line:
            if not is_inclusive and "/_native." in current:
                total += int(line.split()[1])
            is_inclusive = False
    return total


def compiler() -> str:
    """Of the module that is imported, as the compiler wrote it there, and for which processor."""
    from harmonium import _native

    found = re.search(
        rb"(GCC: \([^)\0]*\) [0-9.]+|clang version [0-9.]+)", Path(_native.__file__).read_bytes()
    )
    return f"{found[0].decode() if found else 'unknown'} on {platform.machine()}"


def grown(counts: dict[str, int], written: dict[str, Any]) -> list[str]:
    """A line for each case over its tolerance. Raises CannotCount when the counts are another compiler's."""
    if written["compiler"] != compiler():
        raise CannotCount(f"the counts are of {written['compiler']}; this module is of {compiler()}")
    counted = {name.split(":")[0] for name in counts}
    before_here = {name for name in written["counts"] if name.split(":")[0] in counted}
    missing = sorted(set(counts) ^ before_here)
    lines = [f"{name}: is new or gone; renew the counts" for name in missing]
    for name, value in counts.items():
        before = written["counts"].get(name, value)
        if value > before * (1 + TOLERANCE) + CALL:
            lines.append(f"{name}: {value:,} instructions, {before:,} before ({value / before - 1:+.1%})")
    return lines


def main(argv: Sequence[str]) -> int:
    if argv == ["--inside"]:
        run_cases()
        return 0
    parser = argparse.ArgumentParser(
        prog="instructions.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="renew instructions.json")
    arguments = parser.parse_args(argv)
    try:
        counts = count()
        if arguments.write:
            record = {"compiler": compiler(), "counts": counts}
            WRITTEN.write_text(json.dumps(record, indent=1) + "\n")
        written = json.loads(WRITTEN.read_text())
        lines = grown(counts, written)
    except CannotCount as error:
        print(f"instructions.py: {error}", file=sys.stderr)
        return 2
    except CountFailed as error:
        print(f"instructions.py: {error}", file=sys.stderr)
        return 3
    for name, value in counts.items():
        before = written["counts"].get(name, value)
        print(f"{name:<48}{value:>14,}{value / before - 1:>+8.1%}")
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
