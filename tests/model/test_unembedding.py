"""Rows of logits as far as the sampler needs them: the same tokens as from whole rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.checkpoint.bfloat16 import encode_bfloat16
from harmonium.kernels.matmul import quantize_weight
from harmonium.kernels.unembedding import Wish, quantize_unembedding
from harmonium.model import unembedding as module
from harmonium.model.batch import RowSampling, SamplingParams
from harmonium.model.sampler import sample_rows
from harmonium.model.unembedding import Unembedding, wish_of

V, D = 4_000, 96
WEIGHT = encode_bfloat16(np.random.default_rng(1).standard_normal((V, D)).astype(np.float32) * 0.3)


def row(mask: npt.NDArray[np.uint32] | None = None, key: int = 5, **params: Any) -> RowSampling:
    return RowSampling(SamplingParams(**params), key, allowed_mask=mask)


def mask(share: float) -> npt.NDArray[np.uint32]:
    bits = np.random.default_rng(4).random(V) < share
    bits[17] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


@pytest.mark.parametrize(
    ("sampling", "keep"),
    [
        (row(temperature=0.0), 1),
        (row(temperature=0.0, top_p=0.5, min_p=0.5), 1),
        (row(top_k=1), 1),
        (row(top_k=40, top_p=0.9, min_p=0.1, temperature=2.0), 40),
        (row(mask(0.1), top_p=0.9), 0),
        (row(mask(0.1), logprobs=3, temperature=0.0), 0),
        (row(mask(0.1), temperature=0.0), 1),
        (row(top_p=0.9), None),
        (row(min_p=0.1), None),
        (row(logprobs=0), None),
        (row(logit_bias={3: 1.0}), None),
        (row(top_k=65), None),
        (row(mask(0.5), top_p=0.9), None),
        (row(temperature=0.0, logprobs=0), None),
        (row(temperature=0.0, logit_bias={3: 1.0}), None),
        (row(temperature=0.0, presence_penalty=0.5), None),
        (row(temperature=0.0, frequency_penalty=0.5), None),
        (row(temperature=0.0, repetition_penalty=1.1), None),
        (None, None),
    ],
)
def test_a_row_needs_what_its_settings_look_at(sampling: RowSampling | None, keep: int | None) -> None:
    wish = wish_of(sampling, V)
    assert (None if wish is None else wish.keep) == keep


@pytest.mark.parametrize("allowed", [None, mask(0.1), mask(0.9)])
def test_a_draw_from_the_whole_distribution_needs_what_may_win(
    allowed: npt.NDArray[np.uint32] | None,
) -> None:
    assert wish_of(row(allowed, key=77, temperature=0.7), V) == Wish(0, allowed, 77, 0.7)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 64, "temperature": 3.0},
        {"top_k": 40, "top_p": 0.8, "temperature": 1.5},
        {"top_k": 40, "min_p": 0.2},
        {"top_p": 0.9},
        {},
        {"temperature": 0.2},
        {"temperature": 5.0},
    ],
)
@pytest.mark.parametrize("share", [None, 0.01, 0.2, 0.9])
def test_tokens_are_those_of_whole_rows(settings: dict[str, Any], share: float | None) -> None:
    split = Unembedding(quantize_unembedding(WEIGHT))
    rng = np.random.default_rng(7)
    for _ in range(30):
        num_rows = int(rng.integers(1, 5))
        x = rng.standard_normal((num_rows, D)).astype(np.float32)
        allowed = None if share is None else mask(share)
        sampling = [row(allowed, int(rng.integers(0, 1 << 63)), **settings) for _ in range(num_rows)]
        whole, some = np.empty((num_rows, V), np.float32), np.empty((num_rows, V), np.float32)
        split(x, whole)
        split.sampled_logits(x, sampling, some)
        assert sample_rows(some, sampling) == sample_rows(whole, sampling)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.4}, {"top_k": 20}])
def test_what_is_reported_or_computed_beside_a_row_changes_no_token(settings: dict[str, Any]) -> None:
    """Log-probabilities, more rows than are screened, and a rest: all of them need whole rows."""
    split = Unembedding(quantize_unembedding(WEIGHT))
    x = np.random.default_rng(8).standard_normal((9, D)).astype(np.float32)
    out = np.empty((9, V), np.float32)

    def tokens(rows: slice, **more: Any) -> list[int]:
        sampling = [row(key=40 + i, **settings, **more) for i in range(9)[rows]]
        split.sampled_logits(x[rows], sampling, out[rows])
        return [token.token_id for token in sample_rows(out[rows], sampling) if token is not None]

    alone = [token for i in range(9) for token in tokens(slice(i, i + 1))]
    assert (out == -np.inf).any(), "nothing was screened"
    assert tokens(slice(0, 9)) == alone
    assert tokens(slice(0, 3), logprobs=2) == alone[:3]
    split._num_resting = 1
    assert tokens(slice(0, 2)) == alone[:2]
    assert not split._num_resting


def test_rows_that_cannot_be_screened_are_whole() -> None:
    """One of them, too many of them, or other weights."""
    x = np.random.default_rng(2).standard_normal((6, D)).astype(np.float32)
    greedy = row(temperature=0.0)
    whole, out = np.empty((6, V), np.float32), np.empty((6, V), np.float32)
    split = Unembedding(quantize_unembedding(WEIGHT))
    split(x, whole)
    for sampling in ([greedy, row(top_p=0.5)], [row()] * 5, [None]):
        split.sampled_logits(x[: len(sampling)], sampling, out[: len(sampling)])
        np.testing.assert_array_equal(out[: len(sampling)], whole[: len(sampling)])
    for weight in (WEIGHT, quantize_weight(WEIGHT)):
        other = Unembedding(weight)
        other(x, whole)
        other.sampled_logits(x[:1], [greedy], out[:1])
        np.testing.assert_array_equal(out[0], whole[0])
    assert Unembedding(WEIGHT).mapped and not split.mapped


def test_screening_rests_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are all alike: everything may be the greatest."""
    alike = Unembedding(quantize_unembedding(np.broadcast_to(WEIGHT[:1], WEIGHT.shape).copy()))
    calls = []
    screened = module.screened_logits

    def count(*args: Any) -> float:
        calls.append(screened(*args))
        return calls[-1]

    monkeypatch.setattr(module, "screened_logits", count)
    x, out = np.random.default_rng(2).standard_normal((1, D)).astype(np.float32), np.empty((1, V), np.float32)
    for _ in range(1 + module._REST_STEPS):
        alike.sampled_logits(x, [row(temperature=0.0)], out)
        assert np.isfinite(out).all()
    assert calls == [1.0]
    alike.sampled_logits(x, [row(temperature=0.0)], out)
    assert len(calls) == 2
