"""Opening whole checkpoints: layouts, views, advice, closing, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmonium.checkpoint import Checkpoint, open_checkpoint
from harmonium.checkpoint.bfloat16 import decode_bfloat16
from harmonium.checkpoint.mxfp4 import decode_mxfp4
from harmonium.errors import CheckpointError
from harmonium.testing import RopeSpelling, make_tiny_checkpoint, tiny_config

VOCABULARY = 300


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(
        make_tiny_checkpoint(tmp_path_factory.mktemp("a") / "hf", vocabulary_size=VOCABULARY)
    )


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("rope", ["rope_scaling", "rope_parameters"])
def test_huggingface_spellings_and_shards_give_one_model(
    plain: Checkpoint, tmp_path: Path, rope: RopeSpelling, num_shards: int
) -> None:
    folder = make_tiny_checkpoint(
        tmp_path / "m",
        vocabulary_size=VOCABULARY,
        rope=rope,
        num_shards=num_shards,
    )
    with open_checkpoint(folder) as other:
        assert other.config == plain.config == tiny_config(vocabulary_size=VOCABULARY)
        assert list(other.tensors) == list(plain.tensors)
        for name in plain.tensors:
            np.testing.assert_array_equal(other.tensor(name), plain.tensor(name), err_msg=name)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_original_layout_holds_the_same_model(plain: Checkpoint, tmp_path: Path, num_shards: int) -> None:
    folder = make_tiny_checkpoint(
        tmp_path / "m", vocabulary_size=VOCABULARY, layout="original", num_shards=num_shards
    )
    with open_checkpoint(folder) as other:
        assert other.layout == "original"
        assert other.config == plain.config
        for name, info in plain.tensors.items():
            np.testing.assert_array_equal(other.tensor(name), plain.tensor(name), err_msg=name)
            assert other.tensors[name].nbytes == info.nbytes


def test_bf16_experts_are_the_transposed_mxfp4_experts(plain: Checkpoint, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "m", vocabulary_size=VOCABULARY, experts="bf16")
    with open_checkpoint(folder) as other:
        assert (plain.expert_format, other.expert_format) == ("mxfp4", "bf16")
        for part in ("layers.1.experts.gate_up", "layers.4.experts.down"):
            expected = decode_mxfp4(plain.tensor(f"{part}.blocks"), plain.tensor(f"{part}.scales"))
            found = decode_bfloat16(other.tensor(f"{part}.weight"))
            np.testing.assert_array_equal(found, expected.swapaxes(1, 2))


def test_a_view_is_read_only_and_outlives_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_tiny_checkpoint(tmp_path / "m", vocabulary_size=VOCABULARY))
    view = checkpoint.tensor("embedding.weight")
    before = view.copy()
    checkpoint.close()
    checkpoint.close()
    np.testing.assert_array_equal(view, before)
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.tensor("embedding.weight")
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.advise("embedding.weight", "willneed")


def test_advice_changes_no_value(plain: Checkpoint) -> None:
    names = list(plain.tensors)
    before = {name: plain.tensor(name).copy() for name in names}
    plain.advise(names, "willneed")
    plain.advise(names, "dontneed")
    plain.advise("norm.weight", "dontneed")
    for name in names:
        np.testing.assert_array_equal(plain.tensor(name), before[name], err_msg=name)


def test_a_tied_unembedding_is_the_embedding(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "m", vocabulary_size=VOCABULARY, tied=True)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensors["unembedding.weight"] == checkpoint.tensors["embedding.weight"]


def test_a_download_cache_of_links_opens(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "m", vocabulary_size=VOCABULARY, num_shards=2)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(f"../blobs/{number}")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensor("norm.weight").shape == (96,)


def test_opening_reads_no_weights(tmp_path: Path) -> None:
    """A file whose weights are a hole of 6 GB opens at once: nothing but headers is read."""
    folder = make_tiny_checkpoint(tmp_path / "m", vocabulary_size=VOCABULARY)
    header, rows = _header(folder), (1 << 24) - 1
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        header[name]["shape"][0] = rows
    _write_sparse(folder, header)
    _edit_config(folder, vocab_size=rows)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensors["embedding.weight"].nbytes == rows * 96 * 2


def _header(folder: Path) -> dict[str, Any]:
    content = (folder / "model.safetensors").read_bytes()
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header


def _write_sparse(folder: Path, header: dict[str, Any]) -> None:
    """model.safetensors with this header, offsets made to fit, and a hole for its weights."""
    position = 0
    for name, entry in header.items():
        if name != "__metadata__":
            nbytes = int(np.prod(entry["shape"])) * {"BF16": 2, "U8": 1, "F32": 4, "F16": 2}[entry["dtype"]]
            entry["data_offsets"] = [position, position + nbytes]
            position += nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda header: header.pop(name)


def _set(name: str, **changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[name].update(changes)


def _add(name: str, dtype: str, *shape: int) -> Callable[[dict[str, Any]], object]:
    return lambda header: header.update({name: {"dtype": dtype, "shape": list(shape)}})


LAYER = "model.layers.1."
EXPERTS = f"{LAYER}mlp.experts."

MISMATCHED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing norm": (_drop("model.norm.weight"), r"'model\.norm\.weight' is missing; expected BF16 \[96\]"),
    "missing unembedding, not tied": (_drop("lm_head.weight"), r"'lm_head\.weight' is missing"),
    "missing sinks": (_drop(f"{LAYER}self_attn.sinks"), r"layers\.1\.self_attn\.sinks' is missing"),
    "missing scales": (_drop(f"{EXPERTS}down_proj_scales"), r"down_proj_scales' is missing; expected U8"),
    "missing bias": (_drop(f"{LAYER}self_attn.q_proj.bias"), r"q_proj\.bias' is missing"),
    "float32 norm": (_set("model.norm.weight", dtype="F32"), "has dtype F32; expected BF16"),
    "float16 matrix": (_set(f"{LAYER}self_attn.k_proj.weight", dtype="F16"), "has dtype F16; expected BF16"),
    "bf16 scales": (_set(f"{EXPERTS}down_proj_scales", dtype="BF16"), "has dtype BF16; expected U8"),
    "transposed matrix": (
        _set(f"{LAYER}self_attn.q_proj.weight", shape=[96, 192]),
        r"shape \[96, 192\]; config\.json makes it \[192, 96\]",
    ),
    "flat matrix": (_set(f"{LAYER}self_attn.q_proj.weight", shape=[192 * 96]), r"shape \[18432\]"),
    "blocks of another count": (
        _set(f"{EXPERTS}gate_up_proj_blocks", shape=[4, 128, 3, 16]),
        r"shape \[4, 128, 3, 16\]; config\.json makes it \[5, 128, 3, 16\]",
    ),
    "a layer too many": (_add("model.layers.6.input_layernorm.weight", "BF16", 96), "holds layer 6"),
    "both kinds of experts": (_add(f"{EXPERTS}gate_up_proj", "BF16", 5, 96, 128), "experts in two formats"),
}


@pytest.mark.parametrize("kind", MISMATCHED)
def test_tensors_that_disagree_with_the_config_are_refused(tmp_path: Path, kind: str) -> None:
    change, message = MISMATCHED[kind]
    folder = make_tiny_checkpoint(tmp_path / "m", vocabulary_size=VOCABULARY)
    header = _header(folder)
    change(header)
    _write_sparse(folder, header)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert str(caught.value).startswith(str(folder))


def test_tensors_that_the_model_does_not_use_are_ignored_and_listed(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "m", vocabulary_size=VOCABULARY)
    header = _header(folder)
    _add("model.rotary.inv_freq", "F32", 8)(header)
    _write_sparse(folder, header)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.ignored == ("model.rotary.inv_freq",)


def test_an_index_that_lists_a_tensor_its_shard_lacks_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "m", vocabulary_size=VOCABULARY, num_shards=2)
    path = folder / "model.safetensors.index.json"
    table = json.loads(path.read_text())
    table["weight_map"]["model.norm.weight"] = next(
        name for name in table["weight_map"].values() if name != table["weight_map"]["model.norm.weight"]
    )
    path.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"lacks tensor 'model\.norm\.weight'"):
        open_checkpoint(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "m", vocabulary_size=VOCABULARY)
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors: tensor .* is in a\.safetensors too"):
        open_checkpoint(folder)


def test_a_shard_cut_short_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "m", vocabulary_size=VOCABULARY, num_shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: .*truncated"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_or_folder_in_place_of_a_file_is_refused_without_waiting(tmp_path: Path, name: str) -> None:
    folder = make_tiny_checkpoint(tmp_path / "m", vocabulary_size=VOCABULARY)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="pipe, socket or device"):
        open_checkpoint(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(CheckpointError, match="is a folder; expected a file"):
        open_checkpoint(folder)


def test_a_name_that_the_model_lacks_is_refused(plain: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'layers\.9\.router\.weight'"):
        plain.tensor("layers.9.router.weight")


def test_file_that_is_shortened_while_open_is_noticed_before_it_is_read(tmp_path: Path) -> None:
    """Touching a page behind the end would end the process with SIGBUS."""
    folder = make_tiny_checkpoint(tmp_path / "model", vocabulary_size=64)
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check_sizes()
        os.truncate(folder / "model.safetensors", 4096)
        with pytest.raises(CheckpointError, match=r"shortened to 4,096 bytes while it was in use"):
            checkpoint.check_sizes()
        with pytest.raises(CheckpointError, match="shortened"):
            checkpoint.tensor("norm.weight")
