"""Several processes that share each step of a run: each computes some of its batches, gradients are summed.

The first process is the run: it logs, saves, validates and writes. The others are started by it with the same
settings and only compute. They meet through a file in a temporary folder, and talk over the loopback.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harmonium.errors import TrainingError
from harmonium.finetune.settings import FinetuneSettings

WAIT = timedelta(hours=1)
"""For the slowest process in a step: a validation of the first one is in it."""

PATIENCE = 30.0
"""Seconds in which a process ends when all steps are done."""


_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from harmonium.finetune.processes import compute_along; compute_along()"
)


@dataclass(frozen=True, slots=True)
class World:
    """This process is number `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process logs and writes."""
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes. Raises TrainingError when another one ended."""
        if self.size == 1:
            return list(values)
        table = torch.tensor(values, dtype=torch.float64)
        self._reduce(table)
        return [float(value) for value in table]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gradients summed over the processes; a parameter without one counts as 0."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
        self._reduce(flat)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, total in zip(gradients, torch.split(flat, sizes), strict=True):
            gradient.copy_(total.view_as(gradient))

    def gathered(self, part: Tensor) -> list[Tensor]:
        """The tensors of all processes, by rank; all of one shape."""
        if self.size == 1:
            return [part]
        found = [torch.empty_like(part) for _ in range(self.size)]
        with _errors():
            dist.all_gather(found, part)
        return found

    def _reduce(self, table: Tensor) -> None:
        with _errors():
            dist.all_reduce(table)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise TrainingError(
            f"a process of the run ended or did not answer ({reason}); --resume goes on from the last state"
        ) from None


@contextmanager
def shared_run(settings: FinetuneSettings) -> Iterator[World]:
    """Start the other processes of a run and meet them; they are gone when the block is left."""
    if settings.processes == 1:
        yield World()
        return
    with tempfile.TemporaryDirectory(prefix="harmonium-finetune-") as folder:
        meeting = Path(folder) / "meeting"
        children = [_start(settings, rank, meeting) for rank in range(1, settings.processes)]
        is_done = False
        try:
            yield _meet(meeting, 0, settings.processes)
            is_done = True
        finally:
            for child in children:
                _end(child, PATIENCE if is_done else 0)
            if dist.is_initialized():
                dist.destroy_process_group()


def _end(child: subprocess.Popen[bytes], patience: float) -> None:
    """Wait for a process that has nothing more to do, and stop one that does not end."""
    try:
        child.wait(patience)
    except subprocess.TimeoutExpired:
        child.kill()  # it writes nothing, so nothing is lost
        child.wait()


def _start(settings: FinetuneSettings, rank: int, meeting: Path) -> subprocess.Popen[bytes]:
    task = {"settings": asdict(settings), "rank": rank, "meeting": str(meeting)}
    # Python's own search path, so that the child finds the same packages and not what lies around.
    words = [sys.executable, "-c", _CODE, json.dumps(sys.path)]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert child.stdin is not None
    child.stdin.write(json.dumps(task).encode())
    child.stdin.close()
    return child


def _meet(meeting: Path, rank: int, size: int) -> World:
    # The loopback alone: nothing of a run is open to the network.
    os.putenv("GLOO_SOCKET_IFNAME", "lo")  # read by the library, below Python
    with _errors():
        dist.init_process_group(
            "gloo", init_method=meeting.as_uri(), rank=rank, world_size=size, timeout=WAIT
        )
    return World(rank, size)


def compute_along() -> None:
    """What a started process does: the same run, without a word and without a file."""
    from harmonium.finetune.run import compute_steps

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides when it ends
    task = json.loads(sys.stdin.read())
    given = task["settings"]
    given["targets"] = tuple(given["targets"])
    settings = FinetuneSettings(**given)
    world = _meet(Path(task["meeting"]), task["rank"], settings.processes)
    code = 1
    try:
        compute_steps(settings, world)
        code = 0
    except TrainingError:
        pass  # the first process is gone; it, or its user, has said why
    os._exit(code)  # at once: threads of the group would be torn down in any order
