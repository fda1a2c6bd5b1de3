"""Tiny checkpoints: one seed is one model, made whole or not at all, and Transformers reads it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from harmonium.checkpoint import open_checkpoint
from harmonium.checkpoint.bfloat16 import decode_bfloat16
from harmonium.checkpoint.mxfp4 import decode_mxfp4
from harmonium.config import cache_folder
from harmonium.errors import ConfigError
from harmonium.testing import RECIPE_VERSION, make_tiny_checkpoint, tiny_checkpoint_path, tiny_config

VOCABULARY = 300


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_sizes_differ_pairwise() -> None:
    config = tiny_config()
    sizes = [
        config.hidden_size,
        config.expert_size,
        config.num_heads,
        config.num_kv_heads,
        config.group_size,
        config.head_size,
        config.num_experts,
        config.num_active_experts,
        config.num_layers,
        config.window,
        config.vocabulary_size,
    ]
    assert len(set(sizes)) == len(sizes)


def test_one_seed_is_one_file_for_ever(tmp_path: Path) -> None:
    """Golden logits are made from these bytes. When this fails on purpose, raise RECIPE_VERSION."""
    first = digest(make_tiny_checkpoint(tmp_path / "a", vocabulary_size=VOCABULARY))
    assert first == digest(make_tiny_checkpoint(tmp_path / "b", vocabulary_size=VOCABULARY))
    assert first != digest(make_tiny_checkpoint(tmp_path / "c", vocabulary_size=VOCABULARY, seed=1))
    assert (RECIPE_VERSION, first[:16]) == (1, "ecc1c570792e5ca5")


def test_weights_have_the_spread_that_they_are_made_for(tmp_path: Path) -> None:
    with open_checkpoint(make_tiny_checkpoint(tmp_path / "m", vocabulary_size=2000)) as checkpoint:
        unembedding = decode_bfloat16(checkpoint.tensor("unembedding.weight"))
        assert np.std(unembedding) * np.sqrt(96) == pytest.approx(2.5, rel=0.02)
        assert np.mean(decode_bfloat16(checkpoint.tensor("norm.weight"))) == pytest.approx(1.0, abs=0.1)
        part = "layers.0.experts.gate_up"
        values = decode_mxfp4(checkpoint.tensor(f"{part}.blocks"), checkpoint.tensor(f"{part}.scales"))
        assert np.std(values) * np.sqrt(96) == pytest.approx(2.5, rel=0.05)
        sinks = decode_bfloat16(checkpoint.tensor("layers.5.attention.sinks"))
        assert len(set(sinks.tolist())) == 12


def test_other_sizes_are_kept(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "m", vocabulary_size=40, num_layers=1, hidden_size=32, window=3)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == tiny_config(vocabulary_size=40, num_layers=1, hidden_size=32, window=3)


def test_a_folder_with_files_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        make_tiny_checkpoint(tmp_path / "m", vocabulary_size=VOCABULARY)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["m", "mine"]


def test_an_empty_folder_may_exist(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    open_checkpoint(make_tiny_checkpoint(tmp_path / "m", vocabulary_size=VOCABULARY)).close()


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="original layout has no bf16 experts"):
        make_tiny_checkpoint(tmp_path / "m", layout="original", experts="bf16")
    with pytest.raises(ConfigError, match="num_shards is 0"):
        make_tiny_checkpoint(tmp_path / "m", num_shards=0)
    assert not list(tmp_path.iterdir())


def test_the_cached_checkpoint_is_made_once_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tiny_checkpoint_path()
    assert folder == tmp_path / "harmonium" / f"tiny-{RECIPE_VERSION}"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny_checkpoint_path() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config.vocabulary_size == 201_088


def test_a_cache_that_another_process_fills_meanwhile_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def slower(folder: Path) -> Path:
        make_tiny_checkpoint(folder, vocabulary_size=VOCABULARY)  # the other process
        return make_tiny_checkpoint(folder, vocabulary_size=VOCABULARY)

    monkeypatch.setattr("harmonium.testing.make_tiny_checkpoint", slower)
    folder = tiny_checkpoint_path()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_cache_that_cannot_be_written_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "harmonium").write_text("a file in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be written"):
        tiny_checkpoint_path()


def test_the_cache_folder_follows_the_xdg_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "harmonium"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_folder() == tmp_path / "home" / ".cache" / "harmonium"
    assert not os.listdir(tmp_path)  # noqa: PTH208


@pytest.mark.oracle
def test_transformers_reads_and_saves_the_same_numbers(tmp_path: Path) -> None:
    """Names, orientation and config of the Hugging Face layout, by somebody else's loader and writer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = make_tiny_checkpoint(
        tmp_path / "m", vocabulary_size=VOCABULARY, experts="bf16", rope="rope_parameters"
    )
    model = transformers.GptOssForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    with open_checkpoint(tmp_path / "saved") as saved, open_checkpoint(folder) as made:
        assert saved.config == made.config
        assert saved.expert_format == "bf16"
        for name in made.tensors:
            np.testing.assert_array_equal(saved.tensor(name), made.tensor(name), err_msg=name)
    logits = model.float()(torch.arange(1, 200)[None]).logits.detach().numpy()
    assert 1.0 < np.std(logits) < 5.0
    assert np.abs(logits).max() < 40.0


@pytest.mark.oracle
def test_transformers_unpacks_mxfp4_to_our_bf16_experts(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = make_tiny_checkpoint(tmp_path / "m", vocabulary_size=VOCABULARY, num_shards=2)
    model = transformers.GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=transformers.Mxfp4Config(dequantize=True)
    )
    plain = make_tiny_checkpoint(tmp_path / "plain", vocabulary_size=VOCABULARY, experts="bf16")
    with open_checkpoint(plain) as ours:
        for layer in range(ours.config.num_layers):
            experts = model.model.layers[layer].mlp.experts
            for part, tensor in (("gate_up", experts.gate_up_proj), ("down", experts.down_proj)):
                expected = decode_bfloat16(ours.tensor(f"layers.{layer}.experts.{part}.weight"))
                np.testing.assert_array_equal(tensor.detach().float().numpy(), expected)
