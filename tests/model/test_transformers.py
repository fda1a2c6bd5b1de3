"""Live comparison with Transformers; tests/golden/logits.npz holds what it said for the plain run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmonium.checkpoint import open_checkpoint
from harmonium.model.reference import ReferenceModel
from harmonium.model.rope import inverse_frequencies
from tests.model.tiny_models import CONFIGS, prompt, tiny_checkpoint, tiny_folder
from tests.model.transformers_oracle import transformers_logits, transformers_model

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _needs_torch() -> None:
    pytest.importorskip("torch", reason="the extra [oracle] is not installed: no torch")
    pytest.importorskip("transformers", reason="the extra [oracle] is not installed: no transformers")


def _largest_difference(checkpoint: Any, oracle: Any, name: str, length: int) -> float:
    tokens = prompt(name, length)
    difference_TV = ReferenceModel(checkpoint).logits(tokens) - transformers_logits(oracle, tokens)
    return float(np.abs(difference_TV).max())


@pytest.mark.parametrize("name", ["narrow", "middle", "tall"])
def test_reference_agrees_with_transformers_at_every_position(name: str) -> None:
    checkpoint = tiny_checkpoint(name)
    oracle = transformers_model(checkpoint)
    for length in (1, 7, 129, 300):
        assert _largest_difference(checkpoint, oracle, name, length) < TOLERANCE


@pytest.mark.slow
def test_reference_agrees_with_transformers_past_the_original_context() -> None:
    checkpoint = tiny_checkpoint("middle")
    assert _largest_difference(checkpoint, transformers_model(checkpoint), "middle", 5000) < TOLERANCE


def test_files_of_both_layouts_agree_with_transformers(tmp_path: Path) -> None:
    with open_checkpoint(tiny_folder(tmp_path, "narrow", "original")) as checkpoint:
        oracle = transformers_model(checkpoint)
    for layout in ("huggingface", "original"):
        with open_checkpoint(tiny_folder(tmp_path / "again", "narrow", layout)) as checkpoint:
            assert _largest_difference(checkpoint, oracle, "narrow", 129) < TOLERANCE


@pytest.mark.parametrize("changes", [{"factor": 1.0}, {"truncate": True}, {"original_context": 64}])
def test_other_rope_settings_agree_with_transformers(changes: dict[str, Any]) -> None:
    checkpoint = tiny_checkpoint("narrow", rope=replace(CONFIGS["narrow"].rope, **changes))
    oracle = transformers_model(checkpoint)
    assert _largest_difference(checkpoint, oracle, "narrow", 300) < TOLERANCE


def test_other_layer_kinds_agree_with_transformers() -> None:
    checkpoint = tiny_checkpoint("narrow", layer_kinds=("full", "full", "window", "window", "full", "window"))
    assert _largest_difference(checkpoint, transformers_model(checkpoint), "narrow", 129) < TOLERANCE


def test_frequencies_of_the_released_head_size_agree_to_the_last_bit_but_one() -> None:
    # docs/numerics.md, "Rotary frequencies": PyTorch's power is not always the nearest float32; ours is.
    checkpoint = tiny_checkpoint("wide")
    theirs = transformers_model(checkpoint).model.rotary_emb.inv_freq.numpy()
    ours = inverse_frequencies(checkpoint.config.rope, checkpoint.config.head_size)
    assert np.all(np.abs(ours.view(np.int32) - theirs.view(np.int32)) <= 1)


def test_released_head_size_agrees_with_transformers_as_it_is() -> None:
    checkpoint = tiny_checkpoint("wide")
    oracle = transformers_model(checkpoint)
    for length in (1, 7, 129, 300):
        assert _largest_difference(checkpoint, oracle, "wide", length) < TOLERANCE
