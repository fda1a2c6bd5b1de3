import mmap
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from harmonium.checkpoint import open_checkpoint
from harmonium.model import pages
from harmonium.model.native import NativeRunner
from harmonium.testing import make_tiny_checkpoint

SIZE_BYTES = 8 << 20

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="resident pages are read from /proc/self/smaps"
)


def resident_bytes(path: Path) -> int:
    """Of all maps of the file in this process."""
    total, is_wanted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            is_wanted = line.endswith(str(path))
        elif is_wanted and head == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.parametrize("can_populate", [True, False])
def test_every_page_of_the_array_is_brought_in(
    can_populate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(SIZE_BYTES))
    if not can_populate:
        monkeypatch.setattr(pages, "_advise", lambda start, size, option: False)
    with path.open("rb") as file:
        array = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint16)
    assert resident_bytes(path) == 0
    # An odd part of it: from the middle of a page to the middle of a page.
    pages.bring_in(array[1000:-1000])
    assert resident_bytes(path) == SIZE_BYTES


def test_array_of_no_bytes_is_no_fault() -> None:
    pages.bring_in(np.zeros(0, np.uint8))


def test_closed_reader_brings_in_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    is_first_read, may_go_on = threading.Event(), threading.Event()

    def slow_read(start: int, size: int, option: int) -> bool:
        seen.append(start)
        is_first_read.set()
        return may_go_on.wait(10)

    monkeypatch.setattr(pages, "_advise", slow_read)
    reader = pages.Reader([np.zeros(100, np.uint8) for _ in range(5)])
    assert is_first_read.wait(10)
    closing = threading.Thread(target=reader.close)
    closing.start()
    while not reader._stop.is_set():
        pass
    may_go_on.set()
    closing.join()
    assert len(seen) == 1
    reader.close()


def test_runner_closed_at_once_leaves_no_thread(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", vocabulary_size=512)
    NativeRunner(open_checkpoint(folder), "bf16").close()
    assert not [thread for thread in threading.enumerate() if thread.name == "harmonium-pages"]


def test_loaded_weights_are_resident_once(tmp_path: Path) -> None:
    # The map keeps the experts and small tensors; dense matrices have left it, embedding rows never came.
    folder = make_tiny_checkpoint(
        tmp_path / "model", vocabulary_size=20_000, hidden_size=256, num_layers=2, expert_size=512
    )
    checkpoint = open_checkpoint(folder)
    (file,) = {info.file for info in checkpoint.tensors.values()}
    experts = sum(info.nbytes for name, info in checkpoint.tensors.items() if ".experts." in name)
    matrix = checkpoint.tensors["unembedding.weight"].nbytes
    assert matrix > 4 * experts
    runner = NativeRunner(checkpoint, "int8")
    runner.wait_until_resident()
    # What one fault maps around it (64 KB) comes on top, for a handful of small tensors.
    assert experts <= resident_bytes(file) + 2 * mmap.PAGESIZE < experts + matrix / 4
    runner.close()


def test_memory_that_is_taken_is_resident_and_keeps_what_is_in_it() -> None:
    with mmap.mmap(-1, SIZE_BYTES) as memory:
        array = np.frombuffer(memory, np.uint8)
        array[5 * mmap.PAGESIZE] = 7
        before = _own_resident_bytes()
        pages.take(array, threading.Event())
        assert array[5 * mmap.PAGESIZE] == 7 and int(array.sum()) == 7
        grown = _own_resident_bytes() - before
        assert grown > SIZE_BYTES // 2 or not pages._advise(array.ctypes.data, mmap.PAGESIZE, 23)
        del array


def test_taking_memory_ends_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    stop.set()
    monkeypatch.setattr(pages, "_advise", lambda *arguments: pytest.fail("a page was asked for"))
    pages.take(np.zeros(10, np.uint8), stop)


def _own_resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
