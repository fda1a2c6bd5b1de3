"""What `--tensorboard` writes: with a stand-in for the writer, and with the package where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch")

from harmonium.errors import ConfigError
from harmonium.finetune.loss_log import StepRow, tensorboard_writer

ROWS = [
    StepRow(1, 1, 2.5, None, 1.25, 0.001, 0.5, 64, 40, 0.1),
    StepRow(2, 1, 1.5, 1.75, None, 0.002, 0.25, 64, 40, 0.1),
]
EXPECTED = {
    "loss": [(1, 2.5), (2, 1.5)],
    "validation_loss": [(2, 1.75)],
    "balance": [(1, 1.25)],
    "learning_rate": [(1, 0.001), (2, 0.002)],
    "gradient_norm": [(1, 0.5), (2, 0.25)],
}


def test_each_number_is_written_at_its_step_and_missing_ones_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written: dict[str, list[tuple[int, float]]] = {}
    flushed: list[int] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "events")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.setdefault(name, []).append((step, value))

        def flush(self) -> None:
            flushed.append(sum(map(len, written.values())))

    module = ModuleType("torch.utils.tensorboard")
    monkeypatch.setattr(module, "SummaryWriter", Writer, raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    write = tensorboard_writer(tmp_path / "events")
    for row in ROWS:
        write(row)
    assert written == EXPECTED
    assert flushed == [4, 8], "after every step, so that a kill loses none"


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        tensorboard_writer(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the package itself
def test_the_package_reads_its_events_back(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write = tensorboard_writer(tmp_path)
    for row in ROWS:
        write(row)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(EXPECTED)
    for name, points in EXPECTED.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value)) for step, value in points]
