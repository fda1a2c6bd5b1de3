"""Settings of the sampler are checked when they are made, whatever their type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harmonium.errors import RequestError
from harmonium.model.batch import SamplingParams

NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-0.1, 100.1, NAN, float("inf"), "hot", None, True, 1j)),
        *(("top_k", value) for value in (-1, 1.5, True, "5", None, 1 << 31)),
        *(("top_p", value) for value in (0, 0.0, 1.01, NAN, "x")),
        *(("min_p", value) for value in (-0.1, 1.5, NAN)),
        *(("presence_penalty", value) for value in (-2.1, 2.1, NAN)),
        *(("frequency_penalty", value) for value in (-2.1, 2.1, NAN)),
        *(("repetition_penalty", value) for value in (0, -1, 101, NAN)),
        *(("seed", value) for value in (1.5, "x", 1 << 64, -(1 << 63) - 1)),
        *(("logprobs", value) for value in (-1, 21, 2.0, True)),
        *(("max_tokens", value) for value in (0, -1, 2.5, "5", 1 << 31)),
        *(
            ("logit_bias", value)
            for value in (None, [1], {"5": 1.0}, {5.5: 1.0}, {-1: 1.0}, {5: NAN}, {5: 101})
        ),
    ],
)
def test_value_that_means_nothing_is_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_numpy_numbers_are_numbers() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_k=np.int64(3),  # type: ignore[arg-type]
        seed=np.uint64(7),  # type: ignore[arg-type]
    )
    assert (params.temperature, params.top_k, params.seed) == (0.5, 3, 7)
