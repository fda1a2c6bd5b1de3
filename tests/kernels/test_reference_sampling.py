"""The noise that draws add to logits."""

from __future__ import annotations

import math

import numpy as np

from harmonium.kernels import reference_sampling as reference
from tests.kernels.chi_square import exceeds_chi_square


def test_noise_is_gumbel_and_independent_in_a_panel() -> None:
    noise_KV = np.stack([reference.noise(key, 20) for key in range(20_000)])
    # 200 equal bins of its distribution function, exp(-exp(-x)).
    share_KV = np.exp(-np.exp(-noise_KV))
    counts = np.histogram(share_KV, 200, (0, 1))[0]
    assert not exceeds_chi_square(counts, np.full(200, share_KV.size / 200))
    # Two of a panel, and two of different ones: 10 by 10 bins.
    for first, second in ((0, 1), (3, 15), (2, 17)):
        bins = np.minimum(share_KV[:, [first, second]] * 10, 9).astype(np.int64)
        pairs = np.bincount(bins[:, 0] * 10 + bins[:, 1], minlength=100)
        assert not exceeds_chi_square(pairs, np.full(100, 200.0))
    best = np.bincount(noise_KV[:, :16].argmax(1), minlength=16)
    assert not exceeds_chi_square(best, np.full(16, 20_000 / 16))


def test_the_noise_of_a_key_is_written_down() -> None:
    """Who changes it changes the tokens of every seed."""
    noise_V = reference.noise(7, 201_088)
    np.testing.assert_array_equal(noise_V[:40], reference.noise(7, 40))
    np.testing.assert_allclose(
        noise_V[[0, 1, 15, 16, 201_087]],
        [
            0.09005304441470414,
            0.5464132355747946,
            -0.7413630904536095,
            -0.3206713175649632,
            4.717857547587219,
        ],
        rtol=1e-12,
    )
    assert int(noise_V.argmax()) == 174_931


def test_logarithms_are_those_of_the_library_but_for_rounding() -> None:
    rng = np.random.default_rng(1)
    for x_N in (
        rng.random(2_000),
        rng.random(2_000) * 50,
        1 - 2.0 ** -np.arange(1, 54),
        2.0 ** -np.arange(1, 60),
    ):
        wanted = [math.log(x) for x in x_N]
        np.testing.assert_allclose(reference._natural_log(x_N), wanted, rtol=2e-15, atol=0)
