"""How fast does the disk give pieces of experts, by way of reading, size and number of reads at a time?

    python benchmarks/disk.py FILE... [--seconds 0.5] [--sizes 0.5,2,4,13] [--depths 1,2,4,8] [--json]

The files are read at random places, past the page cache where the way allows it, so large files that nobody
else uses are best: shards of a checkpoint. A row is GB/s at each depth.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from io_uring import Ring  # beside this file

from harmonium.kernels.matmul import allocate
from harmonium.model.direct_reads import aligned
from harmonium.model.streaming_memory import ALIGNMENT

Places = Callable[[], tuple[Path, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description="The disk's rate for reads of experts")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    parser.add_argument("--sizes", default="0.5,2,4,13", help="MiB of a read")
    parser.add_argument("--depths", default="1,2,4,8", help="reads at a time")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    depths = [int(word) for word in options.depths.split(",")]
    rows = []
    for way in options.ways.split(","):
        for size in [float(word) for word in options.sizes.split(",")]:
            rates = []
            for depth in depths:
                forget(options.files)
                rates.append(WAYS[way](options.files, int(size * 2**20), depth, options.seconds))
            rows.append({"way": way, "mib": size, **dict(zip(map(str, depths), rates, strict=True))})
            if not options.json:
                figures = "  ".join(
                    f"{depth:>2}: {rate / 1e9:5.2f}" for depth, rate in zip(depths, rates, strict=True)
                )
                print(f"{way:<12} {size:>5g} MiB   {figures}  GB/s", flush=True)
    if options.json:
        print(json.dumps(rows))


def forget(files: list[Path]) -> None:
    """Out of the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def places_in(files: list[Path], size: int, seed: int) -> Places:
    """Random aligned places with so many bytes behind them."""
    rng = np.random.default_rng(seed)
    blocks = [max(1, (file.stat().st_size - size) // ALIGNMENT) for file in files]

    def next_place() -> tuple[Path, int]:
        index = int(rng.integers(len(files)))
        return files[index], int(rng.integers(blocks[index])) * ALIGNMENT

    return next_place


def memory_of(size: int) -> npt.NDArray[np.uint8]:
    memory = aligned(allocate(size + ALIGNMENT), size)
    memory[:] = 0
    return memory


def by_threads(flags: int, drops: bool) -> Callable[[list[Path], int, int, float], float]:
    """One pread at a time on each of `depth` threads."""

    def measure(files: list[Path], size: int, depth: int, seconds: float) -> float:
        descriptors = {file: os.open(file, os.O_RDONLY | flags) for file in files}
        done = [0] * depth
        end = time.perf_counter() + seconds

        def work(index: int) -> None:
            memory, next_place = memory_of(size), places_in(files, size, index)
            while time.perf_counter() < end:
                file, offset = next_place()
                done[index] += os.preadv(descriptors[file], [memory], offset)
                if drops:
                    os.posix_fadvise(descriptors[file], offset, size, os.POSIX_FADV_DONTNEED)

        return timed(work, depth, done, lambda: [os.close(value) for value in descriptors.values()])

    return measure


def by_map(files: list[Path], size: int, depth: int, seconds: float) -> float:
    """Touch every page of a mapped range, as products on mapped experts do, on each of `depth` threads."""
    maps = {}
    for file in files:
        with file.open("rb") as opened:
            maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    done = [0] * depth
    end = time.perf_counter() + seconds

    def work(index: int) -> None:
        next_place = places_in(files, size, index)
        while time.perf_counter() < end:
            file, offset = next_place()
            view = np.frombuffer(maps[file], np.uint8, size, offset)
            done[index] += int(view[:: mmap.PAGESIZE].astype(np.int64).size) * mmap.PAGESIZE

    return timed(work, depth, done, lambda: None)


def by_ring(files: list[Path], size: int, depth: int, seconds: float) -> float:
    """One thread and `depth` direct reads in an io_uring."""
    descriptors = {file: os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files}
    memory, next_place = memory_of(size * depth), places_in(files, size, 0)
    ring = Ring(depth)

    def submit(tag: int) -> None:
        file, offset = next_place()
        ring.submit(descriptors[file], memory.ctypes.data + tag * size, size, offset, tag)

    total, running = 0, depth
    start = time.perf_counter()
    for tag in range(depth):
        submit(tag)
    while running:
        for tag, count in ring.completed():
            if count < 0:
                raise OSError(-count, os.strerror(-count))
            total += count
            if time.perf_counter() - start < seconds:
                submit(tag)
            else:
                running -= 1
    elapsed = time.perf_counter() - start
    ring.close()
    for descriptor in descriptors.values():
        os.close(descriptor)
    return total / elapsed


def timed(work: Callable[[int], None], depth: int, done: list[int], close: Callable[[], object]) -> float:
    threads = [threading.Thread(target=work, args=(index,)) for index in range(depth)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - start
    close()
    return sum(done) / elapsed


WAYS: dict[str, Callable[[list[Path], int, int, float], float]] = {
    "direct": by_threads(getattr(os, "O_DIRECT", 0), drops=False),
    "io_uring": by_ring,
    "buffered": by_threads(0, drops=True),
    "mapped": by_map,
}

if __name__ == "__main__":
    main()
