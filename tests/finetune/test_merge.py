"""Merging: the new checkpoint holds base plus adapter, whole or not at all. No PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmonium.checkpoint import Checkpoint, open_checkpoint
from harmonium.checkpoint.bfloat16 import decode_bfloat16, encode_bfloat16
from harmonium.checkpoint.lora import open_lora
from harmonium.checkpoint.mxfp4 import decode_mxfp4, quantize_mxfp4
from harmonium.errors import ConfigError
from harmonium.finetune import merge
from harmonium.finetune.merge import merge_adapter
from harmonium.model.reference import ReferenceModel
from harmonium.testing import make_tiny_checkpoint
from tests.lora_files import lora_tensors, make_lora, write_lora
from tests.model.tiny_models import CONFIGS, SIZES, prompt, tiny_folder

MODEL = CONFIGS["narrow"]


def _expert(checkpoint: Checkpoint, name: str, expert: int) -> Any:
    return ReferenceModel(checkpoint).expert_weight(name, expert)


@pytest.mark.parametrize("layout", ["huggingface", "original"])
@pytest.mark.parametrize("wanted", [None, "bf16"])
def test_every_weight_is_base_plus_adapter_rounded_once(layout: Any, wanted: Any, tmp_path: Path) -> None:
    base_folder = tiny_folder(tmp_path, "narrow", layout)
    lora_folder = make_lora(tmp_path / "lora", MODEL)
    report = merge_adapter(base_folder, lora_folder, tmp_path / "merged", wanted)
    with (
        open_checkpoint(base_folder) as base,
        open_checkpoint(tmp_path / "merged") as merged,
        open_lora(lora_folder, MODEL) as files,
    ):
        assert (merged.layout, merged.expert_format) == ("huggingface", wanted or "mxfp4")
        assert merged.config == base.config
        assert merged.ignored == ()
        adapter = files.load()
        for name in merged.tensors:
            base_name, _, kind = name.rpartition(".")
            pair = None
            if name.startswith("layers."):
                pair = adapter.layers[int(name.split(".")[1])].get(base_name.split(".", 2)[2])
            if kind in ("blocks", "scales") or (kind == "weight" and ".experts." in name):
                continue
            if pair is None or kind != "weight":
                np.testing.assert_array_equal(merged.tensor(name), base.tensor(name))
            else:
                expected = encode_bfloat16(decode_bfloat16(base.tensor(name)) + pair.delta())
                np.testing.assert_array_equal(merged.tensor(name), expected)
        for layer in range(MODEL.num_layers):
            for target in ("experts.gate_up", "experts.down"):
                name = f"layers.{layer}.{target}"
                for expert in (0, MODEL.num_experts - 1):
                    exact = _expert(base, name, expert) + adapter.layers[layer][target].delta(expert)
                    kept = _expert(merged, name, expert)
                    rounded = (
                        decode_mxfp4(*quantize_mxfp4(exact))
                        if wanted is None
                        else decode_bfloat16(encode_bfloat16(exact))
                    )
                    np.testing.assert_array_equal(kept, rounded)
        assert report.num_changed == MODEL.num_layers * (5 + 2 * MODEL.num_experts)


def test_merged_bf16_experts_give_the_adapters_logits(tmp_path: Path) -> None:
    base_folder = tiny_folder(tmp_path, "narrow")
    parameters = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    lora_folder = write_lora(
        tmp_path / "lora",
        lora_tensors(MODEL, modules=(), parameters=parameters),
        target_modules=[],
        target_parameters=list(parameters),
    )
    merge_adapter(base_folder, lora_folder, tmp_path / "merged", "bf16")
    tokens = prompt("narrow", 60)
    with (
        open_checkpoint(base_folder) as base,
        open_checkpoint(tmp_path / "merged") as merged,
        open_lora(lora_folder, MODEL) as files,
    ):
        adapted_TV = ReferenceModel(base, adapter=files.load()).logits(tokens)
        merged_TV = ReferenceModel(merged).logits(tokens)
        plain_TV = ReferenceModel(base).logits(tokens)
    scale = adapted_TV.std()
    assert np.median(np.abs(merged_TV - adapted_TV)) < 0.01 * scale
    assert np.median(np.abs(plain_TV - adapted_TV)) > 0.1 * scale


def test_an_adapter_of_attention_leaves_packed_experts_to_the_bit(tmp_path: Path) -> None:
    base_folder = tiny_folder(tmp_path, "narrow")
    lora_folder = write_lora(tmp_path / "lora", lora_tensors(MODEL, parameters=()), target_parameters=[])
    report = merge_adapter(base_folder, lora_folder, tmp_path / "merged")
    assert (report.num_changed, report.expert_change, report.expert_rounding) == (
        4 * MODEL.num_layers,
        0.0,
        0.0,
    )
    with open_checkpoint(base_folder) as base, open_checkpoint(tmp_path / "merged") as merged:
        for name in base.tensors:
            if ".experts." in name:
                np.testing.assert_array_equal(merged.tensor(name), base.tensor(name))


def test_bf16_experts_stay_bf16_and_small_files_come_along(tmp_path: Path) -> None:
    base_folder = tiny_folder(tmp_path, "narrow", experts="bf16")
    (base_folder / "tokenizer_config.json").write_text("{}")
    (base_folder / "notes.txt").write_text("of the owner")
    report = merge_adapter(base_folder, make_lora(tmp_path / "lora", MODEL), tmp_path / "merged")
    assert report.expert_format == "bf16"
    assert report.expert_rounding < 0.01 * report.expert_change
    assert (tmp_path / "merged" / "tokenizer_config.json").read_text() == "{}"
    assert not (tmp_path / "merged" / "notes.txt").exists()


def test_the_report_says_when_mxfp4_swallows_a_small_change(tmp_path: Path) -> None:
    lora_folder = make_lora(tmp_path / "lora", MODEL, strength=1e-3)
    report = merge_adapter(tiny_folder(tmp_path, "narrow"), lora_folder, tmp_path / "merged")
    # The base's numbers are MXFP4 numbers; a change far below their step is rounded away whole.
    assert report.expert_change > 0
    assert report.expert_rounding == pytest.approx(report.expert_change, rel=0.05)


def test_a_tied_unembedding_stays_tied(tmp_path: Path) -> None:
    base_folder = make_tiny_checkpoint(tmp_path / "tied", tied=True, **SIZES["narrow"])
    merge_adapter(base_folder, make_lora(tmp_path / "lora", MODEL), tmp_path / "merged")
    with open_checkpoint(tmp_path / "merged") as merged:
        np.testing.assert_array_equal(merged.tensor("unembedding.weight"), merged.tensor("embedding.weight"))


def test_a_folder_with_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    with pytest.raises(ConfigError, match="full: exists; expected a new or an empty folder"):
        merge_adapter(tiny_folder(tmp_path, "narrow"), make_lora(tmp_path / "lora", MODEL), tmp_path / "full")
    assert (tmp_path / "full" / "mine").read_text() == "keep"


def test_a_merge_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def full_disk(path: Path, tensors: Any) -> None:
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "write_safetensors", full_disk)
    base_folder, lora_folder = tiny_folder(tmp_path, "narrow"), make_lora(tmp_path / "lora", MODEL)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"merged: cannot be written .*No space left"):
        merge_adapter(base_folder, lora_folder, tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before


def test_progress_counts_the_files(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    merge_adapter(
        tiny_folder(tmp_path, "narrow"),
        make_lora(tmp_path / "lora", MODEL),
        tmp_path / "merged",
        progress=lambda done, total: steps.append((done, total)),
    )
    total = MODEL.num_layers + 1
    assert steps == [(done, total) for done in range(total + 1)]
