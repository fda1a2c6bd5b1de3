"""From rows of logits to tokens: what SamplingParams means, told to the kernels.

In this order: the mask of allowed tokens (others get minus infinity, so they have no probability anywhere, in
the reported log-probabilities neither), repetition penalty, presence and frequency penalty, bias; from here
the log-probabilities are reported; then temperature, top_k, top_p, min_p, and the draw: of what is left, the
greatest logit / temperature + noise, where a token's noise depends on the row's `key` and the token alone
(kernels/reference_sampling.py). So what is asked beside it, such as log-probabilities, changes no token, nor
do logits that are left out because they cannot win (unembedding.py). Every instruction set and any number of
threads draws the same token from the same logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from harmonium.errors import EngineError, RequestError
from harmonium.kernels.sampling import Draw, DrawSettings, sample
from harmonium.model.batch import RowSampling, SampledToken


def sample_rows(
    logits_RV: npt.NDArray[np.float32], sampling: Sequence[RowSampling | None]
) -> tuple[SampledToken | None, ...]:
    """One token for each row of logits, None where the row has no sampling; logits_RV is not changed.

    logits_RV: [R, V] float32, C-contiguous; R is len(sampling). Rows share the kernels' threads.
    Raises RequestError when a logit_bias names a token outside the vocabulary, EngineError when a row holds
    NaN, or when nothing that its mask allows has a probability.
    """
    num_rows, vocabulary_size = logits_RV.shape
    assert num_rows == len(sampling), f"{num_rows} rows of logits, {len(sampling)} settings"
    rows = [(row, _settings(wish, vocabulary_size)) for row, wish in enumerate(sampling) if wish is not None]
    tokens: list[SampledToken | None] = [None] * num_rows
    for (row, _), draw in zip(rows, sample(logits_RV, rows), strict=True):
        if draw.status != "ok":
            raise EngineError(_failure(draw, row, logits_RV[row]))
        tokens[row] = SampledToken(token_id=draw.token_id, logprob=draw.logprob, top_logprobs=draw.top)
    return tuple(tokens)


def _settings(row: RowSampling, vocabulary_size: int) -> DrawSettings:
    params = row.params
    bias_ids, bias = _bias_arrays(params.logit_bias, vocabulary_size)
    return DrawSettings(
        key=row.key,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        num_top=-1 if params.logprobs is None else params.logprobs,
        prompt_ids=row.prompt_token_ids,
        answer_ids=row.answer_token_ids,
        answer_counts=row.answer_counts,
        bias_ids=bias_ids,
        bias=bias,
        allowed=row.allowed_mask,
    )


def _bias_arrays(
    logit_bias: Mapping[int, float], vocabulary_size: int
) -> tuple[npt.NDArray[np.int32] | None, npt.NDArray[np.float32] | None]:
    if not logit_bias:
        return None, None
    if max(logit_bias) >= vocabulary_size:
        raise RequestError(
            f"logit_bias names token {max(logit_bias):,}; the vocabulary has {vocabulary_size:,}"
        )
    count = len(logit_bias)
    return np.fromiter(logit_bias.keys(), np.int32, count), np.fromiter(
        logit_bias.values(), np.float32, count
    )


def _failure(draw: Draw, row: int, logits_V: npt.NDArray[np.float32]) -> str:
    if draw.status == "nan":
        is_nan = np.isnan(logits_V)
        return (
            f"the model's logits in row {row} are NaN for {int(is_nan.sum()):,} of {len(logits_V):,} tokens, "
            f"first for token {int(is_nan.argmax()):,}"
        )
    if draw.status == "nothing_allowed":
        return (
            f"no token can follow in row {row}: every logit is minus infinity or forbidden by the token mask"
        )
    return f"out of memory while sampling row {row}"
