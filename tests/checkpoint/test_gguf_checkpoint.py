"""GGUF models: the tensors, and the logits, of the checkpoint that they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmonium.checkpoint import Checkpoint, open_checkpoint
from harmonium.checkpoint.gguf_blocks import decode_q8, encode_q8, join_mxfp4, split_mxfp4
from harmonium.checkpoint.gguf_checkpoint import GgufCheckpoint
from harmonium.config import Weights
from harmonium.errors import CheckpointError
from harmonium.kernels.gguf import q8_to_bf16, read_ggml
from harmonium.llm import LLM
from harmonium.testing import make_tiny_checkpoint, tiny_config
from tests.checkpoint.gguf_files import Tensors, converted, fused, gguf_bytes, metadata_of, write_gguf

CONFIG = tiny_config(vocabulary_size=512, num_layers=2)
TOKENS = [5, 17, 300, 411, 2, 77, 5, 17, 9, 130, 200, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    return make_tiny_checkpoint(folder / "source", vocabulary_size=512, num_layers=2)


@pytest.fixture(scope="module")
def bf16(folder: Path, source: Path) -> Path:
    return write_gguf(folder / "tiny-bf16.gguf", metadata_of(CONFIG), converted(CONFIG))


def assert_same_tensors(got: Checkpoint, expected: Checkpoint) -> None:
    assert got.config == expected.config
    assert list(got.tensors) == list(expected.tensors)
    for name, info in expected.tensors.items():
        assert got.tensors[name].shape == info.shape and got.tensors[name].dtype == info.dtype, name
        values = got.tensor(name)
        assert values.dtype == expected.tensor(name).dtype, name
        assert np.array_equal(values, expected.tensor(name)), name


@pytest.mark.parametrize("dense", ["BF16", "F16", "F32"])
def test_every_tensor_is_that_of_the_source(dense: str, source: Path, tmp_path: Path) -> None:
    tensors = converted(CONFIG, dense=dense)
    path = write_gguf(tmp_path / "x.gguf", metadata_of(CONFIG), tensors)
    with open_checkpoint(path) as got, open_checkpoint(source) as expected:
        if dense == "F16":  # smaller numbers than float16 has are rounded: the rest is exact
            for name in ("layers.1.experts.gate_up.blocks", "layers.1.experts.gate_up.bias", "norm.weight"):
                assert np.array_equal(got.tensor(name), expected.tensor(name)), name
            return
        assert_same_tensors(got, expected)
        assert got.layout == "gguf" and got.expert_format == "mxfp4" and got.ignored == ()


def test_ollamas_fused_layout_has_the_same_tensors(source: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "sha256-abc", metadata_of(CONFIG, "gptoss"), fused(CONFIG))
    with open_checkpoint(path) as got, open_checkpoint(source) as expected:
        assert_same_tensors(got, expected)
        assert got.name == "Tiny", "a file named after its checksum has the name in its metadata"


def test_parts_of_a_split_file_are_one_model(source: Path, tmp_path: Path) -> None:
    tensors = converted(CONFIG)
    write_gguf(tmp_path / "m-00001-of-00003.gguf", metadata_of(CONFIG), [])
    for part in (2, 3):
        write_gguf(tmp_path / f"m-0000{part}-of-00003.gguf", {"split.no": part - 1}, tensors[part - 2 :: 2])
    with open_checkpoint(tmp_path) as got, open_checkpoint(source) as expected:
        assert_same_tensors(got, expected)
        assert got.name == "m"
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf is not there"):
        open_checkpoint(tmp_path)


def logits(path: Path, weights: Weights, **config: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    with LLM(path, weights=weights, context_length=64, threads=1, **config) as llm:
        return llm.logits(TOKENS)


@pytest.mark.parametrize("experts", ["mapped", "packed"])
def test_int8_logits_are_the_sources_to_the_bit(experts: str, source: Path, bf16: Path) -> None:
    expected = logits(source, "int8", experts="mapped")
    assert np.array_equal(logits(bf16, "int8", experts=experts), expected)


def test_bf16_logits_are_the_sources_to_the_bit(source: Path, bf16: Path) -> None:
    assert np.array_equal(logits(bf16, "bf16"), logits(source, "bf16"))


def test_ollamas_layout_has_the_same_logits(source: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", metadata_of(CONFIG, "gptoss"), fused(CONFIG))
    assert np.array_equal(logits(path, "int8"), logits(source, "int8"))


def test_q8_logits_are_within_the_error_of_int8(source: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "q8.gguf", metadata_of(CONFIG), converted(CONFIG, dense="Q8_0"))
    exact, int8, q8 = logits(source, "bf16"), logits(source, "int8"), logits(path, "int8")
    error = np.sqrt(np.mean((int8 - exact) ** 2))
    assert 0 < np.sqrt(np.mean((q8 - exact) ** 2)) < 1.5 * error
    assert np.abs(q8 - exact).max() < 2 * np.abs(int8 - exact).max()


def test_q8_is_decoded_as_specified() -> None:
    rows = encode_q8(np.random.default_rng(0).normal(size=(7, 96)).astype(np.float32))
    rows[0, :2] = np.array([0.0], "<f2").view(np.uint8)
    rows[1, :2] = np.array([6e-8], "<f2").view(np.uint8)  # a subnormal scale
    bits = q8_to_bf16(rows)
    from harmonium.checkpoint.bfloat16 import encode_bfloat16

    assert np.array_equal(bits, encode_bfloat16(decode_q8(rows)))


@pytest.mark.parametrize("is_split", [True, False])
def test_native_order_is_the_specifications(is_split: bool) -> None:
    random = np.random.default_rng(1)
    first, second = (random.integers(0, 256, (3, 51), dtype=np.uint8) for _ in range(2))
    blocks, scales = read_ggml(first, second, is_split)
    for half, rows in ((0, first), (1, second)):
        expected_blocks, expected_scales = split_mxfp4(rows, is_split)
        assert np.array_equal(blocks[half::2], expected_blocks)
        assert np.array_equal(scales[half::2], expected_scales)
    assert np.array_equal(join_mxfp4(*split_mxfp4(first, is_split), is_split), first)


def changed(metadata: dict[str, object], **changes: object) -> dict[str, object]:
    """Metadata with "gpt-oss." keys changed; None takes one away. A double underscore stands for a dot."""
    table = dict(metadata)
    for name, value in changes.items():
        key = name.replace("__", ".") if name.startswith("general") else f"gpt-oss.{name.replace('__', '.')}"
        if value is None:
            del table[key]
        else:
            table[key] = value
    return table


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"general__architecture": "llama"}, "general.architecture is 'llama'; Harmonium runs 'gpt-oss'"),
        ({"block_count": None}, "gpt-oss.block_count is None; expected a whole number"),
        ({"block_count": 1}, "holds layer 1; its block_count is 1"),
        ({"block_count": 3}, r"tensor 'blk\.2\.attn_norm\.weight' is missing"),
        (
            {"embedding_length": 128},
            r"tensor 'token_embd\.weight' has shape \[512, 96\]; the metadata make it",
        ),
        ({"expert_used_count": 9}, "expert_used_count is 9; the model has 5 experts"),
        ({"attention__head_count_kv": 5}, "attention.head_count is 12; expected a multiple"),
        ({"rope__scaling__type": "linear"}, "rope.scaling.type is 'linear'"),
        ({"rope__scaling__factor": 0.5}, "rope.scaling.factor is 0.5"),
        ({"attention__value_length": 32}, "value_length differs from key_length"),
        ({"attention__key_length": "x"}, "attention.key_length is 'x'"),
    ],
)
def test_metadata_that_do_not_fit_are_named(
    changes: dict[str, object], expected: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "x.gguf", changed(metadata_of(CONFIG), **changes), converted(CONFIG))
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(path)


def without(tensors: Tensors, name: str) -> Tensors:
    return [tensor for tensor in tensors if tensor[0] != name]


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    tensors = converted(CONFIG)
    name = "blk.0.ffn_down_exps.weight"
    shape = next(array.shape for stored, _, array in tensors if stored == name)
    as_q8 = (name, "Q8_0", np.zeros((*shape[:-1], shape[-1] // 17 * 34), np.uint8))
    cases = [
        (without(tensors, name), r"'blk\.0\.ffn_down_exps\.weight' is missing"),
        ([*without(tensors, name), as_q8], "has type Q8_0; expected MXFP4"),
        (without(tensors, "token_embd.weight"), r"'token_embd\.weight' is missing"),
    ]
    for number, (listed, expected) in enumerate(cases):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(gguf_bytes(metadata_of(CONFIG), listed))
        with pytest.raises(CheckpointError, match=expected):
            open_checkpoint(path)


def test_fused_experts_are_read_where_their_order_is_known(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", metadata_of(CONFIG, "gpt-oss"), fused(CONFIG))
    with pytest.raises(CheckpointError, match=r"ffn_gate_up_exps\.\w+' has gate and up in one"):
        open_checkpoint(path)


def test_a_list_of_tokens_must_have_the_embeddings_length(tmp_path: Path) -> None:
    metadata = metadata_of(CONFIG) | {"tokenizer.ggml.tokens": ["a"]}
    path = write_gguf(tmp_path / "x.gguf", metadata, converted(CONFIG))
    with pytest.raises(CheckpointError, match=r"lists 1 tokens; token_embd\.weight has 512 rows"):
        open_checkpoint(path)


def test_an_output_that_is_left_out_is_the_embedding(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", metadata_of(CONFIG), without(converted(CONFIG), "output.weight"))
    with open_checkpoint(path) as checkpoint:
        assert np.array_equal(checkpoint.tensor("unembedding.weight"), checkpoint.tensor("embedding.weight"))


def test_a_folder_with_several_models_asks_which(tmp_path: Path, bf16: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(bf16.read_bytes())
    with pytest.raises(CheckpointError, match=r"several GGUF files, such as a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)
    with open_checkpoint(tmp_path / "a.gguf") as checkpoint:
        assert isinstance(checkpoint, GgufCheckpoint) and checkpoint.name == "a"


def test_fingerprints_tell_models_apart(tmp_path: Path, bf16: Path) -> None:
    other = write_gguf(tmp_path / "x.gguf", metadata_of(CONFIG), converted(CONFIG, seed=1))
    with open_checkpoint(bf16) as first, open_checkpoint(bf16) as again, open_checkpoint(other) as second:
        assert first.fingerprint() == again.fingerprint() != second.fingerprint()
