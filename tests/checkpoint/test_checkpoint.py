"""Opening whole checkpoints: layouts, views, advice, closing, and what is refused."""

from __future__ import annotations

from pathlib import Path

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
