"""The training loop: repeatable, goes on exactly after a kill, and what it writes is what was measured."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import harmonium  # noqa: E402
from harmonium.checkpoint import open_checkpoint  # noqa: E402
from harmonium.errors import ConfigError, TrainingError  # noqa: E402
from harmonium.finetune.data import Sample  # noqa: E402
from harmonium.finetune.export import export_checkpoint  # noqa: E402
from harmonium.finetune.lora import LoraSettings, attach_lora  # noqa: E402
from harmonium.finetune.loss_log import LossLog  # noqa: E402
from harmonium.finetune.optimizer import orthogonal, rate_share  # noqa: E402
from harmonium.finetune.packing import pack, packed_batches  # noqa: E402
from harmonium.finetune.settings import FinetuneSettings  # noqa: E402
from harmonium.finetune.state import RunFolder  # noqa: E402
from harmonium.finetune.train import batch_loss, mean_loss, train  # noqa: E402
from harmonium.model.torch import TorchModel  # noqa: E402
from harmonium.testing import tiny_config  # noqa: E402

VOCABULARY = 90
CONFIG = tiny_config(
    vocabulary_size=VOCABULARY,
    num_layers=2,
    hidden_size=32,
    expert_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    num_experts=3,
)
FULL = FinetuneSettings(
    method="full", from_scratch="config.json", epochs=4, batch_tokens=64, threads=1, save_every=2, seed=5
)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def counting_samples(number: int = 10) -> list[Sample]:
    """Each token is the one before plus one; the first three have no loss."""
    samples = []
    for index in range(number):
        ids = (np.arange(8 + index) + 5 * index) % VOCABULARY
        weights = np.ones(len(ids), np.float32)
        weights[:3] = 0
        samples.append(Sample(ids.astype(np.int32), weights, index + 1))
    return samples


def new_model() -> TorchModel:
    return TorchModel.from_config(CONFIG, seed=1)


def numbers(folder: Path) -> list[dict[str, str]]:
    """loss.csv without the times."""
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in LossLog(folder / "loss.csv").rows()
    ]


def weights_of(model: TorchModel) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_same_seed_gives_the_same_weights_to_the_bit(optimizer: Any, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        model = new_model()
        train(model, counting_samples(), replace(FULL, optimizer=optimizer, max_steps=4), tmp_path / name)
        found.append(weights_of(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    start = weights_of(new_model())
    assert not torch.equal(
        start["model.layers.0.mlp.experts.down_proj"], found[0]["model.layers.0.mlp.experts.down_proj"]
    )


def test_training_learns_and_ends_at_the_best_validation(tmp_path: Path) -> None:
    samples = counting_samples()
    settings = replace(FULL, epochs=12, optimizer="muon", lr=5e-3, quantize_last=0.3, validation="held")
    model = new_model()
    result = train(model, samples, settings, tmp_path, validation=samples[:3])
    rows = numbers(tmp_path)
    assert float(rows[-1]["loss"]) < 0.75 * float(rows[0]["loss"])
    held = [(float(row["validation_loss"]), int(row["step"])) for row in rows if row["validation_loss"]]
    assert len(held) == 12
    assert min(held) == (result.best_validation, result.best_step)
    export_checkpoint(model, tmp_path / "model")
    exported = TorchModel.from_checkpoint(tmp_path / "model")
    loss = mean_loss(exported, packed_batches(samples[:3], 64))
    # Dense weights are rounded to bf16 in the file; the experts were used as MXFP4 already.
    assert loss == pytest.approx(result.best_validation, rel=5e-3)
    with open_checkpoint(tmp_path / "model") as opened:
        assert opened.config == CONFIG
        assert opened.expert_format == "mxfp4"


_SCRIPT = """
import os, signal, sys
from dataclasses import replace
from harmonium.finetune.train import train

sys.path.append(sys.argv[3])
from tests.finetune.test_train import FULL, counting_samples, new_model

def watch(row, total):
    if row.step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

settings = replace(FULL, optimizer="muon", resume=True, validation="held")
train(new_model(), counting_samples(), settings, sys.argv[1], validation=counting_samples(2), watch=watch)
"""


def test_a_killed_run_goes_on_to_the_same_numbers_and_weights(tmp_path: Path) -> None:
    settings = replace(FULL, optimizer="muon", validation="held")
    whole = new_model()
    train(whole, counting_samples(), settings, tmp_path / "whole", validation=counting_samples(2))
    # Killed after step 5, when the state after step 4 is the last one.
    killed = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path / "killed"), "5", str(Path(__file__).parents[2])],
        # The package that is tested, wherever it is installed, before the one in the source tree.
        env={**os.environ, "PYTHONPATH": str(Path(harmonium.__file__).parents[1])},
        cwd=tmp_path,
        check=False,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(numbers(tmp_path / "killed")) == 5
    model = new_model()
    resumed = replace(settings, resume=True)
    train(model, counting_samples(), resumed, tmp_path / "killed", validation=counting_samples(2))
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    before, after = weights_of(whole), weights_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_settings_or_data_do_not_go_on(tmp_path: Path) -> None:
    settings = replace(FULL, max_steps=2)
    train(new_model(), counting_samples(), settings, tmp_path)
    with pytest.raises(ConfigError, match=r"lr is 0\.1, and the run in .* has None"):
        train(new_model(), counting_samples(), replace(settings, lr=0.1, resume=True), tmp_path)
    with pytest.raises(ConfigError, match="the data differs"):
        train(new_model(), counting_samples(9), replace(settings, resume=True), tmp_path)


def test_packed_samples_do_not_see_each_other() -> None:
    model, samples = new_model(), counting_samples(4)
    together = pack(samples)
    assert together.start_S == (0, 8, 17, 27)
    with torch.no_grad():
        alone = sum(float(batch_loss(model, pack([sample]))[0]) for sample in samples)
        assert float(batch_loss(model, together)[0]) == pytest.approx(alone, rel=1e-5)


def test_accumulated_batches_give_the_gradient_of_one_batch(tmp_path: Path) -> None:
    samples = counting_samples(4)
    found = []
    for name, size, accumulate in (("one", 256, 1), ("many", 12, 8)):
        model = new_model()
        settings = replace(
            FULL,
            batch_tokens=size,
            accumulate=accumulate,
            max_steps=1,
            balance=0.0,
            clip=0.0,
            quantize_last=0.0,
        )
        train(model, samples, settings, tmp_path / name)
        found.append(numbers(tmp_path / name)[0])
    assert found[0]["num_loss_tokens"] == found[1]["num_loss_tokens"]
    for column in ("loss", "gradient_norm"):
        assert float(found[0][column]) == pytest.approx(float(found[1][column]), rel=1e-4)


def test_lora_trains_the_adapter_and_nothing_else(tmp_path: Path) -> None:
    model = new_model()
    before = weights_of(model)
    lora = attach_lora(model, LoraSettings(rank=2, targets=("attention", "experts", "router")), seed=0)
    settings = FinetuneSettings(lr=1e-2, epochs=2, batch_tokens=64, threads=1)
    train(model, counting_samples(), settings, tmp_path, lora=lora)
    after = {name.replace(".base.", "."): value for name, value in model.named_parameters()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(bool(value.any()) for name, value in lora.named_parameters() if name.endswith(".b"))


def test_early_stopping_ends_when_nothing_gets_better(tmp_path: Path) -> None:
    samples = counting_samples()
    settings = replace(FULL, lr=0.0, muon_lr=0.0, validation="held", early_stopping=2, validate_every=1)
    result = train(new_model(), samples, settings, tmp_path, validation=samples[:2])
    # Rates of 0: no validation after the first is better. Rounding sets in later, and does not matter here.
    assert (result.num_steps, result.stopped_early, result.best_step) == (3, True, 1)


def test_a_loss_that_is_no_number_stops_and_keeps_the_state(tmp_path: Path) -> None:
    model = new_model()

    def spoil(row: Any, total: int) -> None:
        if row.step == 3:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = math.nan

    with pytest.raises(TrainingError, match=r"step 4: the loss is nan.*the state after step 2"):
        train(model, counting_samples(), replace(FULL, epochs=3), tmp_path, watch=spoil)
    state = RunFolder(tmp_path).last()
    assert state is not None
    assert all(bool(torch.isfinite(value.float()).all()) for value in state.tensors.values())


def test_ctrl_c_saves_the_step_that_it_met(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(row: Any, total: int) -> None:
        if row.step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(new_model(), counting_samples(), replace(FULL, save_every=100), tmp_path, watch=interrupt)
    state = RunFolder(tmp_path).last()
    assert state is not None
    assert state.step == 3
    assert "stopping after this step" in capsys.readouterr().err


def test_a_thread_may_train_too(tmp_path: Path) -> None:
    done: list[int] = []
    thread = threading.Thread(
        target=lambda: done.append(
            train(new_model(), counting_samples(3), replace(FULL, max_steps=1), tmp_path).num_steps
        )
    )
    thread.start()
    thread.join()
    assert done == [1]


def test_samples_may_be_made_step_by_step(tmp_path: Path) -> None:
    asked: list[int] = []

    def source(step: int) -> list[Sample]:
        asked.append(step)
        return counting_samples(step + 1)

    train(new_model(), source, replace(FULL, max_steps=3), tmp_path)
    assert asked == [0, 1, 2]
    assert [int(row["num_tokens"]) for row in numbers(tmp_path)] == [8, 17, 27]
    with pytest.raises(ConfigError, match="max_steps is None"):
        train(new_model(), source, FULL, tmp_path / "endless")


def test_the_rate_rises_and_falls() -> None:
    settings = FinetuneSettings(warmup=0.25)
    shares = [rate_share(step, 20, settings) for step in range(20)]
    assert shares[:5] == [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6]
    assert shares[5] == 1.0
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert 0.02 <= shares[-1] < 0.1


def test_muons_directions_have_singular_values_near_one() -> None:
    matrices = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.5


def test_a_full_disk_is_said_and_leaves_no_half_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harmonium.finetune import state

    def full(path: Path, tensors: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "write_safetensors", full)
    with pytest.raises(ConfigError, match=r"step-00000002: the state cannot be written .No space left"):
        train(new_model(), counting_samples(), FULL, tmp_path)
    assert list((tmp_path / "training").iterdir()) == []
