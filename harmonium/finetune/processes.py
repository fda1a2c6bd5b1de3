"""Several processes that share each step of a run: each computes some of its batches, gradients are summed.

The first process is the run: it logs, saves, validates and writes. The others are started by it with the same
settings and only compute. They meet through a file in a temporary folder, and talk over the loopback.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harmonium.errors import HarmoniumError, TrainingError
from harmonium.finetune.settings import FinetuneSettings

WAIT = timedelta(hours=1)
"""For the slowest process in a step: a validation of the first one is in it."""

PATIENCE = 30.0
"""Seconds in which a process ends when all steps are done."""

_LOOK_EVERY = 0.05
"""Seconds between looks at processes that start."""


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
        children = [_start(settings, rank, Path(folder)) for rank in range(1, settings.processes)]
        is_done = False
        try:
            _await_start(children, Path(folder))
            yield _meet(Path(folder), 0, settings.processes)
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


def _await_start(children: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    """Until all have loaded: from then on one that ends is noticed by its closed connections."""
    while not all(_ready(folder, rank).exists() for rank in range(1, len(children) + 1)):
        for rank, child in enumerate(children, 1):
            if child.poll() is not None:
                raise TrainingError(
                    f"process {rank} of the run ended while it started, with code {child.returncode}"
                )
        time.sleep(_LOOK_EVERY)
    (folder / "go").touch()


def _ready(folder: Path, rank: int) -> Path:
    return folder / f"ready-{rank}"


def _start(settings: FinetuneSettings, rank: int, folder: Path) -> subprocess.Popen[bytes]:
    task = {"settings": asdict(settings), "rank": rank, "folder": str(folder), "parent": os.getpid()}
    # Python's own search path, so that the child finds the same packages and not what lies around.
    words = [sys.executable, "-c", _CODE, json.dumps(sys.path)]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it is gone already, which is found when it is awaited
        child.stdin.write(json.dumps(task).encode())
        child.stdin.close()
    return child


def _meet(folder: Path, rank: int, size: int) -> World:
    # The loopback alone: nothing of a run is open to the network.
    os.putenv("GLOO_SOCKET_IFNAME", "lo")  # read by the library, below Python
    with _errors():
        meeting = (folder / "meeting").as_uri()
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=WAIT)
    return World(rank, size)


def compute_along() -> None:
    """What a started process does: the same run, without a word and without a file."""
    from harmonium.finetune.run import compute_steps

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides when it ends
    task = json.loads(sys.stdin.read())
    given = task["settings"]
    given["targets"] = tuple(given["targets"])
    settings = FinetuneSettings(**given)
    folder = Path(task["folder"])
    _ready(folder, task["rank"]).touch()
    code = 1
    # The first process meets the same errors, and says them; or it is gone, and nobody is left to tell.
    with contextlib.suppress(HarmoniumError):
        while not (folder / "go").exists():
            if os.getppid() != task["parent"]:
                raise TrainingError("the first process is gone")
            time.sleep(_LOOK_EVERY)
        compute_steps(settings, _meet(folder, task["rank"], settings.processes))
        code = 0
    os._exit(code)  # at once: threads of the group would be torn down in any order
