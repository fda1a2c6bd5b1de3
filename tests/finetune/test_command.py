"""`harmonium finetune` from its words to its files. Models are tiny, on one thread."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from harmonium.checkpoint import open_checkpoint
from harmonium.cli import main
from harmonium.errors import ConfigError
from harmonium.model.attention import Device
from harmonium.testing import make_tiny_checkpoint

LINE = {
    "messages": [
        {"role": "user", "content": "Who won?"},
        {"role": "assistant", "reasoning": "Blue led.", "content": "Blue."},
    ]
}
TINY = {
    "num_layers": 1,
    "hidden_size": 32,
    "expert_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 8,
}


def data(tmp_path: Path, count: int = 4) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text((json.dumps(LINE) + "\n") * count)
    return path


def complaint(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["finetune", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_check_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "check", str(data(tmp_path))]) == 0
    assert "4 lines, 4 samples" in capsys.readouterr().out


def test_help_shows_the_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "merge MODEL ADAPTER --out DIR" in shown
    assert "--early-stopping" in shown


def test_wrong_words_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "one word too many: 'b'" in complaint(capsys, "a", "b")
    assert "expected: merge MODEL ADAPTER --out DIR" in complaint(capsys, "merge", "a", "--out", "x")
    assert "merge takes no --rank" in complaint(capsys, "merge", "a", "b", "--out", "x", "--rank", "3")
    assert "expected one: the data's file" in complaint(capsys, "check")
    assert "did you mean --epochs?" in complaint(capsys, "a", "--epoch", "3")


def test_without_pytorch_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'harmonium[torch]'" in complaint(capsys, "a", "--data", data(tmp_path), "--out", "x")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real vocabulary, for the data is text; small in everything else (26 MB)."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "base", num_experts=2, **TINY)


def test_what_is_missing_or_in_the_way_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    lines, out = data(tmp_path), tmp_path / "out"
    assert "data is missing" in complaint(capsys, base, "--out", out)
    assert "out is missing" in complaint(capsys, base, "--data", lines)
    assert "the model is missing" in complaint(capsys, "--data", lines, "--out", out)
    (out / "training").mkdir(parents=True)
    said = complaint(capsys, base, "--data", lines, "--out", out)
    assert "exists and has files" in said
    assert "--resume goes on" in said
    assert list(out.iterdir()) == [out / "training"]


def test_lora_from_words_to_an_adapter_that_merges(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from harmonium.checkpoint.lora import open_lora

    out = tmp_path / "out"
    words = ["--rank", "2", "--epochs", "2", "--lr", "1e-2", "--validation", "0.25", "--threads", "1"]
    assert main(["finetune", str(base), "--data", str(data(tmp_path)), "--out", str(out), *words]) == 0
    assert "adapter after 2 steps" in capsys.readouterr().out
    names = {path.name for path in out.iterdir()} - {"loss.png"}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "finetune.json", "loss.csv"}
    summary = json.loads((out / "finetune.json").read_text())
    # What was written and read again is what was measured last.
    assert summary["validation_loss"] == pytest.approx(summary["training"]["best_validation"], rel=1e-5)
    with open_checkpoint(base) as opened, open_lora(out, opened.config) as adapter:
        assert adapter.max_rank == 2
    merged = tmp_path / "merged"
    assert main(["finetune", "merge", str(base), str(out), "--out", str(merged), "--export", "bf16"]) == 0
    with open_checkpoint(merged) as opened:
        assert opened.expert_format == "bf16"
    said = complaint(capsys, base, "--data", data(tmp_path), "--out", out, "--resume")
    assert "the run in it is finished" in said


def test_from_scratch_writes_the_model_that_was_measured(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    words: list[Any] = ["--from-scratch", base / "config.json", "--method", "full", "--max-steps", "2"]
    words += ["--data", data(tmp_path), "--validation", "0.25", "--threads", "1", "--out", tmp_path / "new"]
    assert main(["finetune", *map(str, words)]) == 0
    summary = json.loads((tmp_path / "new" / "finetune.json").read_text())
    assert summary["validation_loss"] == pytest.approx(summary["training"]["best_validation"], rel=1e-2)
    with open_checkpoint(tmp_path / "new") as made, open_checkpoint(base) as source:
        assert made.config == source.config


def test_full_training_of_a_large_model_is_refused_before_it_starts() -> None:
    pytest.importorskip("torch")
    from harmonium.finetune.run import _refuse_large
    from harmonium.testing import tiny_config

    large = tiny_config(num_layers=24, hidden_size=2880, expert_size=2880, num_experts=4096)
    with pytest.raises(ConfigError, match=r"full training of .* weights needs .* GB"):
        _refuse_large(large, Device("cpu"))
    card = Device("cuda", (9, 0), "Some Card", 1 << 30)
    with pytest.raises(ConfigError, match=r"there are 1\.1 GB on Some Card; expected --method lora"):
        _refuse_large(large, card)


def test_a_gpu_that_is_not_there_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = [base, "--data", data(tmp_path), "--device", "cuda", "--out", tmp_path / "out"]
    assert main(["finetune", *map(str, words)]) == 2
    assert "device is 'cuda' and PyTorch" in capsys.readouterr().err
    words += ["--processes", "2", "--accumulate", "2"]
    assert main(["finetune", *map(str, words)]) == 2
    assert "processes is 2, which share the CPU's cores; expected 1" in capsys.readouterr().err
