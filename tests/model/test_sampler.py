from __future__ import annotations

import numpy as np
import pytest

from harmonium.errors import EngineError, RequestError
from harmonium.kernels import reference_sampling as reference
from harmonium.model.batch import RowSampling, SampledToken, SamplingParams
from harmonium.model.sampler import sample_rows

GREEDY = SamplingParams(temperature=0.0)


def test_rows_without_sampling_give_none() -> None:
    logits_RV = np.zeros((3, 40), np.float32)
    logits_RV[1, 7] = 2.0
    assert sample_rows(logits_RV, [None, RowSampling(GREEDY, 0), None]) == (None, SampledToken(7), None)
    assert sample_rows(logits_RV[:0], []) == ()
    assert sample_rows(logits_RV, [None] * 3) == (None, None, None)


def test_each_setting_reaches_the_draw() -> None:
    """Every parameter changes the distribution as the specification says, so none is dropped on the way."""
    rng = np.random.default_rng(2)
    x_V = rng.normal(0, 1.5, 120).astype(np.float32)
    ids = np.array([3, 50, 119], np.int32)
    counts = np.array([1, 2, 5], np.int32)
    params = SamplingParams(
        temperature=0.8,
        top_k=30,
        top_p=0.9,
        min_p=0.03,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
        logit_bias={4: 3.0, 110: -2.0},
        logprobs=6,
    )
    mask = np.array([0xFFFFFFFF, 0x0F0F0F0F, 0xFFFFFFFF, 0xFFFFFFFF], np.uint32)
    adjusted_V = reference.adjust_logits(
        x_V,
        allowed=mask,
        prompt_ids=ids[:2],
        answer_ids=ids,
        answer_counts=counts,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        bias_ids=np.array([4, 110], np.int32),
        bias=np.array([3.0, -2.0], np.float32),
    )
    kept_V = reference.keep_filtered(adjusted_V, 0.8, 30, 0.9, 0.03)
    for key in range(30):
        row = RowSampling(params, key, ids[:2], ids, counts, mask)
        (found,) = sample_rows(x_V[None], [row])
        assert found is not None
        assert found.token_id == reference.draw_token(adjusted_V, kept_V > 0, 0.8, key)
        assert found.logprob == pytest.approx(
            reference.log_probabilities(adjusted_V)[found.token_id], abs=1e-5
        )
        wanted = reference.top_logprobs(adjusted_V, 6)
        assert [token for token, _ in found.top_logprobs] == [token for token, _ in wanted]


def test_nan_names_row_and_token() -> None:
    logits_RV = np.zeros((2, 50), np.float32)
    logits_RV[1, [17, 20]] = np.nan
    with pytest.raises(EngineError, match="logits in row 1 are NaN for 2 of 50 tokens, first for token 17"):
        sample_rows(logits_RV, [RowSampling(GREEDY, 0), RowSampling(GREEDY, 0)])
    assert sample_rows(logits_RV, [RowSampling(GREEDY, 0), None]) == (SampledToken(0), None)


def test_a_mask_that_allows_nothing_is_an_engine_error() -> None:
    row = RowSampling(GREEDY, 0, allowed_mask=np.zeros(2, np.uint32))
    with pytest.raises(EngineError, match="no token can follow in row 0"):
        sample_rows(np.zeros((1, 50), np.float32), [row])


def test_bias_outside_the_vocabulary_is_a_request_error() -> None:
    row = RowSampling(SamplingParams(logit_bias={50: 1.0}), 0)
    with pytest.raises(RequestError, match="token 50; the vocabulary has 50"):
        sample_rows(np.zeros((1, 50), np.float32), [row])
