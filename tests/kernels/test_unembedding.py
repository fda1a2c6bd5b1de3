"""Split weights: the numbers of their specification, and screened logits that miss nothing that is kept."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.kernels import reference_matmul, reference_sampling, unembedding
from harmonium.kernels.unembedding import SplitWeight, Wish

Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint16]

# Outputs with and without a tail of a panel (16) and a tile (32); blocks in pairs and not; tokens of one pass
# and more.
SHAPES = [(1, 32, 1), (16, 64, 2), (37, 96, 3), (64, 288, 6), (100, 160, 7), (48, 2880, 13), (33, 64, 140)]


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bf16(x: Floats) -> Bits:
    return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)


def words(allowed: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    padded = np.zeros(-(-allowed.size // 32) * 32, np.bool_)
    padded[: allowed.size] = allowed
    return np.packbits(padded, bitorder="little").view(np.uint32)


def dequantized(weight: Bits) -> npt.NDArray[np.float64]:
    q, scale = reference_matmul.quantize_weight(weight, 119)
    return np.asarray(q.astype(np.float64) * np.repeat(scale.astype(np.float64), 32, axis=-1))


@pytest.mark.parametrize(("num_outputs", "num_inputs", "num_tokens"), SHAPES)
def test_logits_are_the_specification(isa: str, num_outputs: int, num_inputs: int, num_tokens: int) -> None:
    x, weight = normal(1, num_tokens, num_inputs), bf16(normal(2, num_outputs, num_inputs))
    out = np.zeros((num_tokens, num_outputs), np.float32)
    unembedding.logits(x, unembedding.quantize_unembedding(weight), out)
    q, scale = reference_matmul.quantize_activations(x)
    rounded = q.astype(np.float64) * np.repeat(scale.astype(np.float64), 32, axis=-1)
    expected = rounded @ dequantized(weight).T
    reach = np.abs(rounded) @ np.abs(dequantized(weight)).T
    assert np.all(np.abs(out - expected) <= 1e-5 * reach + 1e-6)


def test_a_row_has_the_same_bits_in_any_company(isa: str) -> None:
    """Sums have one order, and products of integers are exact."""
    x, weight = normal(1, 29, 352), bf16(normal(2, 83, 352))
    split = unembedding.quantize_unembedding(weight)
    whole = np.empty((29, 83), np.float32)
    unembedding.logits(x, split, whole)
    for num_rows in (1, 2, 7, 12):
        out = np.empty((num_rows, 83), np.float32)
        unembedding.logits(x[:num_rows], split, out)
        np.testing.assert_array_equal(out, whole[:num_rows])


def large(seed: int) -> tuple[SplitWeight, Floats]:
    """A vocabulary of 5,003 by 256, in which some rows have far larger weights, and four rows of activations
    of very different blocks.
    """
    weight = normal(seed, 5_003, 256) * 0.05
    weight[::97] *= 20
    weight[40:50] = 0
    weight[60] = weight[3_000]
    x = normal(seed + 1, 4, 256)
    x[1, ::40] *= 50
    x[2] *= 10.0 ** np.random.default_rng(seed).integers(-3, 3, 256)
    x[3, :] = 0
    x[3, 7] = 1
    return unembedding.quantize_unembedding(bf16(weight)), x


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("keep", [1, 2, 20, 64, 6_000])
def test_screened_logits_keep_the_greatest_to_the_bit(isa: str, seed: int, keep: int) -> None:
    weight, x = large(seed)
    whole = np.empty((4, 5_003), np.float32)
    unembedding.logits(x, weight, whole)
    for num_rows in (1, 2, 3, 4):
        out = np.full((num_rows, 5_003), np.nan, np.float32)
        share = unembedding.screened_logits(x[:num_rows], weight, [Wish(keep)] * num_rows, out)
        assert 0 < share <= 1
        for row in range(num_rows):
            check_kept(out[row], whole[row], keep)


def check_kept(out: Floats, whole: Floats, keep: int) -> None:
    """What is there has the bits of the whole row; nothing that belongs to the greatest is missing."""
    there = out != -np.inf
    np.testing.assert_array_equal(out[there], whole[there])
    least = np.sort(whole)[-keep:][0]
    assert there[whole >= least].all()


def test_screening_reads_little_where_one_logit_leads(isa: str) -> None:
    """What it is for: activations that point to a row, as a model's do."""
    weight_VD = normal(5, 20_000, 512) * 0.05
    x = weight_VD[[15_000]] * 20
    split, out = unembedding.quantize_unembedding(bf16(weight_VD)), np.empty((1, 20_000), np.float32)
    share = unembedding.screened_logits(x, split, [Wish(1)], out)
    assert out.argmax() == 15_000
    assert share < 0.75  # the leader may come late; behind it nothing is read
    first = weight_VD[[3]] * 20
    assert unembedding.screened_logits(first, split, [Wish(1)], out) < 0.01
    assert out.argmax() == 3 and (out == -np.inf).mean() > 0.99


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("temperature", [1e-9, 0.3, 1.0, 20.0])
def test_what_a_draw_takes_is_there_to_the_bit(isa: str, seed: int, temperature: float) -> None:
    weight, x = large(seed)
    whole = np.empty((4, 5_003), np.float32)
    unembedding.logits(x, weight, whole)
    everything = np.ones(5_003, np.bool_)
    for num_rows in (1, 2, 3, 4):
        out = np.full((num_rows, 5_003), np.nan, np.float32)
        keys = [1000 * seed + 10 * num_rows + row for row in range(num_rows)]
        wishes = [Wish(key=key, temperature=temperature) for key in keys]
        assert 0 < unembedding.screened_logits(x[:num_rows], weight, wishes, out) <= 1
        for row in range(num_rows):
            there = out[row] != -np.inf
            np.testing.assert_array_equal(out[row][there], whole[row][there])
            wanted = reference_sampling.draw_token(whole[row], everything, temperature, keys[row])
            assert there[wanted]
            assert reference_sampling.draw_token(out[row], there, temperature, keys[row]) == wanted


@pytest.mark.parametrize("deviation", [0.5, 2.0, 8.0])
def test_draws_read_little_of_logits_like_a_models(isa: str, deviation: float) -> None:
    """Flat or steep: about exp(bound / temperature) rows remain, or those near the greatest."""
    weight_VD = normal(5, 20_000, 512) * 0.05
    split, out = unembedding.quantize_unembedding(bf16(weight_VD)), np.empty((1, 20_000), np.float32)
    x = normal(6, 1, 512) * np.float32(deviation / 0.05 / np.sqrt(512))
    shares = [
        unembedding.screened_logits(x, split, [Wish(key=key, temperature=1.0)], out) for key in range(5)
    ]
    assert max(shares) < 0.25


def test_draws_share_a_step_with_other_rows(isa: str) -> None:
    weight, x = large(2)
    whole, out = np.empty((3, 5_003), np.float32), np.empty((3, 5_003), np.float32)
    unembedding.logits(x[:3], weight, whole)
    allowed = np.random.default_rng(8).random(5_003) < 0.3
    wishes = [Wish(3), Wish(key=11, temperature=1.0), Wish(0, words(allowed), 12, 1.0)]
    unembedding.screened_logits(x[:3], weight, wishes, out)
    check_kept(out[0], whole[0], 3)
    for row, key, kept in ((1, 11, np.ones(5_003, np.bool_)), (2, 12, allowed)):
        there = out[row] != -np.inf
        np.testing.assert_array_equal(out[row][there], whole[row][there])
        assert not (there & ~kept).any()
        wanted = reference_sampling.draw_token(whole[row], kept, 1.0, key)
        assert reference_sampling.draw_token(out[row], there, 1.0, key) == wanted


@pytest.mark.parametrize("keep", [0, 1, 5])
def test_a_mask_leaves_the_greatest_of_what_it_allows(isa: str, keep: int) -> None:
    weight, x = large(9)
    whole = np.empty((2, 5_003), np.float32)
    unembedding.logits(x[:2], weight, whole)
    rng = np.random.default_rng(3)
    for share_allowed in (0.001, 0.05, 0.9):
        allowed = rng.random((2, 5_003)) < share_allowed
        allowed[:, 5_002] = True
        out = np.empty((2, 5_003), np.float32)
        wishes = [Wish(keep, words(allowed[row])) for row in range(2)]
        read = unembedding.screened_logits(x[:2], weight, wishes, out)
        if share_allowed == 0.001:
            assert read < 0.1
        for row in range(2):
            masked = np.where(allowed[row], whole[row], -np.inf).astype(np.float32)
            if keep == 0:
                np.testing.assert_array_equal(out[row], masked)
            else:
                check_kept(out[row], masked, min(keep, int(allowed[row].sum())))


def test_a_row_may_be_whole_beside_one_that_is_screened(isa: str) -> None:
    weight, x = large(2)
    whole, out = np.empty((2, 5_003), np.float32), np.empty((2, 5_003), np.float32)
    unembedding.logits(x[:2], weight, whole)
    assert unembedding.screened_logits(x[:2], weight, [Wish(1), Wish(0)], out) == 1
    np.testing.assert_array_equal(out, whole)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e12, 1e25])
def test_very_small_and_very_large_numbers_hide_nothing(isa: str, scale: float) -> None:
    """Estimates that under- or overflow prove nothing, so such rows are computed."""
    weight_VD = normal(5, 300, 64) * np.float32(scale)
    x = np.float32([[1e-12], [1e10]]) * normal(6, 2, 64)
    split = unembedding.quantize_unembedding(bf16(weight_VD))
    whole, out = np.empty((2, 300), np.float32), np.empty((2, 300), np.float32)
    unembedding.logits(x, split, whole)
    unembedding.screened_logits(x, split, [Wish(3)] * 2, out)
    for row in range(2):
        check_kept(out[row], whole[row], 3)
    everything = np.ones(300, np.bool_)
    unembedding.screened_logits(x, split, [Wish(key=5, temperature=1.0)] * 2, out)
    for row in range(2):
        there = out[row] != -np.inf
        wanted = reference_sampling.draw_token(whole[row], everything, 1.0, 5)
        assert there[wanted] and reference_sampling.draw_token(out[row], there, 1.0, 5) == wanted


def test_what_is_not_finite_is_never_screened_away(isa: str) -> None:
    weight_VD = bf16(normal(1, 200, 64))
    weight_VD[[3, 170], [40, 0]] = 0x7F80, 0x7FC0  # infinity, NaN
    split, out = unembedding.quantize_unembedding(weight_VD), np.zeros((2, 200), np.float32)
    x = normal(2, 2, 64)
    x[1, 5] = np.nan
    for wish in (Wish(1), Wish(key=3, temperature=1.0)):
        unembedding.screened_logits(x, split, [wish] * 2, out)
        assert np.isnan(out[0, [3, 170]]).all() and np.isnan(out[1]).all()


def test_errors_are_within_the_bound_that_screening_trusts() -> None:
    """The low halves, as the weights' bytes have them: evenly spread, whatever the weights are."""
    rng = np.random.default_rng(0)
    weight_VD = rng.integers(-3, 4, (64, 2880)).astype(
        np.float32
    )  # few values: without dither, few low halves
    split = unembedding.quantize_unembedding(bf16(weight_VD))
    low = split.data[4 * (45 * 576) :].reshape(4, 90, 4, 16, 4)
    nibbles = np.stack([low & 15, low >> 4], -1).transpose(0, 3, 1, 2, 4, 5).reshape(64, 2880)
    errors = nibbles - 7.5
    x = rng.integers(-127, 128, (2880, 400)).astype(np.float64)
    x /= np.sqrt((x**2).sum(0))
    sums = errors @ x
    assert abs(sums.std() / np.sqrt(21.25) - 1) < 0.1
    assert np.abs(sums).max() < 6 * np.sqrt(21.25)  # the bound is 10.5


def test_wrong_arrays_are_named() -> None:
    weight, x = large(1)
    out = np.empty((4, 5_003), np.float32)
    with pytest.raises(ValueError, match="expected 1 to 4"):
        unembedding.screened_logits(
            normal(1, 5, 256), weight, [Wish(1)] * 5, np.empty((5, 5_003), np.float32)
        )
    with pytest.raises(ValueError, match="keep is -1"):
        unembedding.screened_logits(x[:1], weight, [Wish(-1)], out[:1])
    with pytest.raises(ValueError, match="temperature is -1"):
        unembedding.screened_logits(x[:1], weight, [Wish(temperature=-1.0)], out[:1])
    with pytest.raises(ValueError, match="both keep and a temperature"):
        unembedding.screened_logits(x[:1], weight, [Wish(2, temperature=1.0)], out[:1])
    with pytest.raises(ValueError, match="one for each row"):
        unembedding.screened_logits(x[:2], weight, [Wish(1)], out[:2])
    with pytest.raises(ValueError, match="too few words"):
        unembedding.screened_logits(x[:1], weight, [Wish(1, np.zeros(4, np.uint32))], out[:1])
    with pytest.raises(ValueError, match="multiple of 32"):
        unembedding.quantize_unembedding(bf16(normal(1, 8, 40)))
    with pytest.raises(ValueError, match="split has size"):
        unembedding.logits(normal(1, 1, 64), weight, out[:1])


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 100])
def test_allowed_tokens_are_counted(count: int) -> None:
    allowed = np.zeros(100, np.bool_)
    allowed[:count] = True
    assert unembedding.count_allowed(words(allowed)) == count
