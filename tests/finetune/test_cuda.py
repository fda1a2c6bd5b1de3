"""Training on a GPU: the CPU's gradients, an adapter that the CPU reads, a run that goes on.."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", reason="the extra [torch] is not installed")

if not torch.cuda.is_available():
    pytest.skip("PyTorch finds no GPU", allow_module_level=True)

from harmonium.errors import MemoryPlanError  # noqa: E402
from harmonium.finetune.lora import LoraSettings, attach_lora, load_lora  # noqa: E402
from harmonium.finetune.packing import packed_batches  # noqa: E402
from harmonium.finetune.run import finetune  # noqa: E402
from harmonium.finetune.settings import FinetuneSettings  # noqa: E402
from harmonium.finetune.train import batch_loss, mean_loss, train  # noqa: E402
from harmonium.model.torch import TorchModel  # noqa: E402
from tests.finetune.test_train import CONFIG, FULL, counting_samples  # noqa: E402
from tests.model.tiny_models import tiny_checkpoint  # noqa: E402

CUDA = torch.device("cuda")


def _lora(seed: int = 1) -> tuple[Any, Any]:
    model = TorchModel.from_checkpoint(tiny_checkpoint("narrow"))
    lora = attach_lora(model, LoraSettings(rank=4, targets=("attention", "experts", "router")), seed)
    return model, lora


def test_gradients_are_those_of_the_cpu() -> None:
    (batch,) = packed_batches(counting_samples(), 4096)
    found = []
    for device in ("cpu", "cuda"):
        model, lora = _lora()
        with torch.no_grad():  # B begins at zero, where A has no gradient
            for parameter in lora.parameters():
                parameter.add_(0.02)
        model.to(device)
        loss, balance = batch_loss(model, batch, with_balance=True)
        (loss + balance).backward()
        found.append((float(loss.detach()), [parameter.grad.cpu() for parameter in lora.parameters()]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for there, here in zip(found[1][1], found[0][1], strict=True):
        assert float((there - here).abs().max()) <= 2e-4 * float(here.abs().max()) + 2e-6


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_full_training_on_a_gpu_is_that_of_the_cpu_but_for_rounding(optimizer: str, tmp_path: Path) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        settings = FinetuneSettings(
            method="full", from_scratch="c", epochs=4, batch_tokens=64, threads=1, seed=5, optimizer=optimizer
        )
        model = TorchModel.from_config(CONFIG, 5).to(device)
        result = train(model, counting_samples(), settings, tmp_path / device)
        losses.append(result.loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_run_on_a_gpu_goes_on_after_its_last_state(tmp_path: Path) -> None:
    whole = train(TorchModel.from_config(CONFIG, 5).to(CUDA), counting_samples(), FULL, tmp_path / "whole")
    cut = replace(FULL, save_every=3)

    class Stop(Exception):
        pass

    def watch(row: Any, total: int) -> None:
        if row.step == 5:
            raise Stop

    model = TorchModel.from_config(CONFIG, 5).to(CUDA)
    with pytest.raises(Stop):
        train(model, counting_samples(), cut, tmp_path / "cut", watch=watch)
    model = TorchModel.from_config(CONFIG, 6).to(CUDA)
    again = train(model, counting_samples(), replace(cut, resume=True), tmp_path / "cut")
    assert again.num_steps == whole.num_steps
    assert again.loss == pytest.approx(whole.loss, rel=1e-3)


def test_an_adapter_trained_there_is_read_on_the_cpu(tmp_path: Path) -> None:
    model, lora = _lora()
    model.to(CUDA)
    samples, settings = counting_samples(), FinetuneSettings(epochs=12, lr=2e-2, batch_tokens=512)
    batches = packed_batches(samples, 512)
    before = mean_loss(model, batches)
    train(model, samples, settings, tmp_path / "run", lora=lora)
    after = mean_loss(model, batches)
    assert after < 0.7 * before
    lora.save(tmp_path / "adapter", "narrow")
    here = TorchModel.from_checkpoint(tiny_checkpoint("narrow"))
    load_lora(here, tmp_path / "adapter")
    assert mean_loss(here, batches) == pytest.approx(after, rel=1e-3)


def test_a_full_card_is_said_with_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def take_all(*_: Any) -> Any:
        return torch.empty(1 << 50, dtype=torch.uint8, device=CUDA)

    monkeypatch.setattr("harmonium.finetune.run._finetune", take_all)
    with pytest.raises(MemoryPlanError, match=r"the GPU's memory is full \(CUDA out of memory.*batch-tokens"):
        finetune(FinetuneSettings())
