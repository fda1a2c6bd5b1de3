#!/usr/bin/env python3
"""Prove that the kernels of each instruction set export nothing but their tables.

    tools/check_symbols.py build/dev

An inline function of a C++ library header that is compiled in an AVX-512 file becomes a weak symbol, which
the linker may take for the whole module: older processors then crash in code that never asked for AVX-512. So
every global or weak definition in the object files of the isa_* targets must be a table: data of ours whose
name has the instruction set in it, as kOpsAvx512 has. Exit status 1, with one line for each offender, if one
is not; 2 if there is nothing to look at.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TABLE = re.compile(r"[RD] harmonium::k\w*(Scalar|Avx2|Avx512)\w*$")


def foreign_symbols(nm_output: str) -> list[str]:
    """Return the definitions in `nm -C`'s output that another object file could link to, tables aside."""
    foreign = []
    for line in nm_output.splitlines():
        definition = re.match(r"[0-9a-f]+ ((\w) .+)$", line)  # an undefined symbol has no address
        # Lower case is local, except u, v, w (unique and weak).
        if (
            definition
            and (definition[2].isupper() or definition[2] in "uvw")
            and not TABLE.match(definition[1])
        ):
            foreign.append(definition[1])
    return foreign


def object_files(build: Path) -> list[Path]:
    """Return the object files of the isa_* targets below a CMake build directory."""
    return sorted(path for path in build.rglob("*.o") if any(part.startswith("isa_") for part in path.parts))


def main(arguments: list[str]) -> int:
    """Check the build directory named by the arguments."""
    if len(arguments) != 1:
        print("usage: tools/check_symbols.py BUILD_DIRECTORY", file=sys.stderr)
        return 2
    objects = object_files(Path(arguments[0]))
    if not objects:
        print(f"{arguments[0]}: no object files of isa_* targets; build first (./dev-build)", file=sys.stderr)
        return 2
    offenders = 0
    for path in objects:
        output = subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True).stdout
        for symbol in foreign_symbols(output):
            print(f"{path}: {symbol}")
            offenders += 1
    return 1 if offenders else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
