from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.checkpoint import open_checkpoint
from harmonium.errors import RequestError
from harmonium.model import reference
from harmonium.model.reference import ReferenceModel, swiglu
from tests.model.tiny_models import (
    CONFIGS,
    PROMPT_LENGTHS,
    kept_positions,
    prompt,
    tiny_checkpoint,
    tiny_folder,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "logits.npz"
TOLERANCE = 1e-4  # docs/numerics.md: the largest difference seen is 1.6e-5


@pytest.fixture(scope="module")
def golden() -> dict[str, npt.NDArray[Any]]:
    with np.load(GOLDEN) as archive:
        return dict(archive)


@pytest.mark.parametrize("name", CONFIGS)
def test_golden_file_was_made_from_these_weights(name: str, golden: dict[str, Any]) -> None:
    assert tiny_checkpoint(name).fingerprint() == str(golden[f"{name}/fingerprint"]), (
        "the tiny models changed: run tests/golden/make_logits.py again"
    )


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_reference_agrees_with_stored_transformers_logits(
    name: str, length: int, golden: dict[str, Any]
) -> None:
    logits_TV = ReferenceModel(tiny_checkpoint(name)).logits(prompt(name, length))
    assert logits_TV.dtype == np.float32
    expected_RV = golden[f"{name}/{length}"]
    assert expected_RV.std() > 0.5, "logits should be of order 1, else the tolerance says nothing"
    np.testing.assert_allclose(logits_TV[kept_positions(name, length)], expected_RV, rtol=0, atol=TOLERANCE)


def test_float64_differs_from_float32_by_rounding_alone() -> None:
    checkpoint, tokens = tiny_checkpoint("wide"), prompt("wide", 129)
    exact_TV = ReferenceModel(checkpoint, np.float64).logits(tokens)
    assert exact_TV.dtype == np.float64
    assert 0 < np.abs(ReferenceModel(checkpoint).logits(tokens) - exact_TV).max() < TOLERANCE


def test_query_tile_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, tokens = tiny_checkpoint("tall"), prompt("tall", 129)
    whole_TV = ReferenceModel(checkpoint).logits(tokens)
    monkeypatch.setattr(reference, "QUERY_TILE", 7)
    np.testing.assert_allclose(ReferenceModel(checkpoint).logits(tokens), whole_TV, rtol=0, atol=2e-5)


def test_logits_do_not_depend_on_later_tokens() -> None:
    checkpoint, tokens = tiny_checkpoint("middle"), prompt("middle", 129)
    model = ReferenceModel(checkpoint)
    np.testing.assert_allclose(model.logits(tokens)[:50], model.logits(tokens[:50]), rtol=0, atol=2e-5)


def test_window_layers_see_exactly_their_window() -> None:
    # One window layer: the last token's logits depend on the last `window` tokens and on nothing before them.
    checkpoint = tiny_checkpoint("narrow", num_layers=1, layer_kinds=("window",))
    model, window, tokens = ReferenceModel(checkpoint), 8, prompt("narrow", 129)
    last_V = model.logits(tokens)[-1]

    def changed_at(position: int) -> npt.NDArray[Any]:
        other = tokens.copy()
        other[position] = (other[position] + 1) % checkpoint.config.vocabulary_size
        return np.asarray(model.logits(other)[-1])

    # Not equal to the bit: another token may group the experts' rows otherwise, and BLAS sums accordingly.
    np.testing.assert_allclose(changed_at(129 - window - 1), last_V, rtol=0, atol=1e-5)
    assert np.abs(changed_at(129 - window) - last_V).max() > 1e-4


@pytest.mark.parametrize(
    ("layout", "experts"), [("huggingface", "mxfp4"), ("original", "mxfp4"), ("huggingface", "bf16")]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_gives_the_logits_of_the_same_numbers(
    name: str, layout: Any, experts: Any, tmp_path: Path, golden: dict[str, Any]
) -> None:
    with open_checkpoint(tiny_folder(tmp_path, name, layout, experts)) as checkpoint:
        assert (checkpoint.layout, checkpoint.expert_format) == (layout, experts)
        for length in (1, 7, 129):
            logits_TV = ReferenceModel(checkpoint).logits(prompt(name, length))
            kept_RV = logits_TV[kept_positions(name, length)]
            np.testing.assert_allclose(kept_RV, golden[f"{name}/{length}"], rtol=0, atol=TOLERANCE)


def test_swiglu_clamps_the_gate_above_and_the_up_part_on_both_sides() -> None:
    gate_up = np.array([9.0, 9.0, -9.0, -9.0, 7.0, 7.0, -1000.0, 0.5], dtype=np.float32)
    unit = swiglu(gate_up, 7.0, 1.702)
    assert unit[0] == unit[2]
    assert unit[1] == pytest.approx(-9.0 / (1 + np.exp(1.702 * 9)) * (-7 + 1), rel=1e-5)
    assert unit[3] == 0.0


@pytest.mark.parametrize(("tokens", "message"), [([], "at least one"), ([3, 331], "331"), ([-1], "-1")])
def test_bad_token_ids_are_refused_with_the_value(tokens: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ReferenceModel(tiny_checkpoint("narrow")).logits(tokens)
