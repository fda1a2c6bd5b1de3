from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.kernels import reference_sampling as reference
from harmonium.kernels import runtime
from harmonium.kernels.sampling import Draw, DrawSettings, sample, sampling_scratch_bytes
from tests.kernels.chi_square import exceeds_chi_square

VOCABULARY = 201_088
Row = npt.NDArray[np.float32]


pytestmark = pytest.mark.usefixtures("isa")


def draw(logits_V: Row, **settings: Any) -> Draw:
    return sample(logits_V[None], [(0, DrawSettings(**{"key": 0, "temperature": 1.0, **settings}))])[0]


def rows() -> dict[str, Row]:
    """Random and adversarial rows, of sizes with and without tails."""
    rng = np.random.default_rng(5)
    peaked = rng.normal(0, 3, 4001).astype(np.float32)
    ties = rng.integers(-3, 4, 1543).astype(np.float32)
    holes = np.where(rng.random(1000) < 0.7, -np.inf, rng.normal(0, 2, 1000)).astype(np.float32)
    one_hot = np.full(777, -np.inf, np.float32)
    one_hot[700] = -5.0
    zeros = np.where(rng.random(300) < 0.5, -0.0, 0.0).astype(np.float32)
    return {
        "peaked": peaked,
        "ties": ties,
        "uniform": np.full(2049, 1.5, np.float32),
        "holes": holes,
        "one_hot": one_hot,
        "signed zeros": zeros,
        "single": np.array([3.0], np.float32),
        "huge": np.array([3e38, -3e38, 3e38, 0.0, np.inf * -1], np.float32),
        "denormal": np.array([1e-42, 0.0, -1e-42] * 50, np.float32),
        "infinite": np.array([1.0, np.inf, 2.0, np.inf, -np.inf] * 60, np.float32),
        "all far below zero": (rng.normal(0, 1, 513) - 5000).astype(np.float32),
        "steep": np.arange(0, -600, -1, dtype=np.float32),
    }


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 100.0},
    {"temperature": 1e-9},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 700},
    {"top_k": 10**6},
    {"top_p": 0.5},
    {"top_p": 0.95, "temperature": 1.7},
    {"top_p": 1e-9},
    {"top_p": 0.999999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8},
    {"top_k": 40, "min_p": 0.3, "temperature": 2.0},
]


@pytest.mark.parametrize("name", list(rows()))
def test_draws_agree_with_the_specification(name: str) -> None:
    x_V = rows()[name]
    for filters in FILTERS:
        settings: dict[str, Any] = {"temperature": 1.0, **filters}
        keys = range(12)
        found = sample(x_V[None], [(0, DrawSettings(key, **settings)) for key in keys])
        # float32 may keep a token more or less at the border, but only within its rounding.
        kept = [reference.keep_filtered(x_V, **_scaled(settings, by)) > 0 for by in (1, 1 - 1e-5, 1 + 1e-5)]
        for key in keys:
            wanted = {
                reference.draw_token(x_V, is_kept_V, settings["temperature"], key) for is_kept_V in kept
            }
            assert found[key].token_id in wanted, f"{filters}, key {key}: {found[key]}, expected {wanted}"


def _scaled(settings: dict[str, Any], by: float) -> dict[str, Any]:
    return {
        name: min(1.0, value * by) if name in ("top_p", "min_p") else value
        for name, value in settings.items()
    }


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.1, "temperature": 1.5},
    ],
    ids=str,
)
def test_filters_keep_what_the_specification_keeps(filters: dict[str, Any]) -> None:
    """Everything that is kept is drawn at some time, and nothing else ever."""
    x_V = np.random.default_rng(31).normal(0, 0.6, 60).astype(np.float32)
    settings: dict[str, Any] = {"temperature": 1.0, **filters}
    found = sample(x_V[None], [(0, DrawSettings(key, **settings)) for key in range(5_000)])
    kept_V = reference.keep_filtered(x_V, **settings)
    assert {draw.token_id for draw in found} == set(np.flatnonzero(kept_V).tolist())


def test_top_p_ties_keep_the_lowest_ids() -> None:
    x_V = np.zeros(1000, np.float32)
    found = {draw(x_V, key=key, top_p=0.1005).token_id for key in range(2000)}
    assert found == set(range(101))


def test_top_k_ties_keep_the_lowest_ids() -> None:
    x_V = np.zeros(1000, np.float32)
    x_V[[500, 900]] = 1.0
    found = {draw(x_V, key=key, top_k=5).token_id for key in range(2000)}
    assert found == {0, 1, 2, 500, 900}


@pytest.mark.parametrize("vocabulary_size", [5, 16, 37, 300])
def test_draws_follow_the_distribution(vocabulary_size: int) -> None:
    """20,000 draws with fixed keys, of less than a panel of 16, of one, and of some and a tail."""
    x_V = np.random.default_rng(11).normal(0, 1.5, vocabulary_size).astype(np.float32)
    num_draws = 20_000
    choices: list[dict[str, Any]] = [
        {},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"top_k": 30, "temperature": 1.5},
    ]
    for filters in choices:
        settings: dict[str, Any] = {"temperature": 1.0, **filters}
        found = sample(x_V[None], [(0, DrawSettings(key, **settings)) for key in range(num_draws)])
        counts = np.bincount([draw.token_id for draw in found], minlength=vocabulary_size)
        kept_V = reference.keep_filtered(x_V, **settings)
        assert counts[kept_V == 0].sum() == 0
        assert not exceeds_chi_square(counts, kept_V / kept_V.sum() * num_draws)


def test_draws_of_neighboring_keys_are_independent() -> None:
    x_V = np.array([0.0, 0.5, -0.5, 1.0], np.float32)
    found = [
        draw.token_id for draw in sample(x_V[None], [(0, DrawSettings(key, 1.0)) for key in range(20_001)])
    ]
    pairs = np.bincount(np.array(found[:-1]) * 4 + np.array(found[1:]), minlength=16)
    share_V = np.exp(x_V.astype(np.float64)) / np.exp(x_V.astype(np.float64)).sum()
    assert not exceeds_chi_square(pairs, np.outer(share_V, share_V).reshape(-1) * 20_000)


def test_the_token_of_a_key_is_written_down() -> None:
    """Who changes it changes the tokens of every seed."""
    assert draw(np.zeros(VOCABULARY, np.float32), key=7).token_id == 174_931


def test_logits_that_differ_by_less_than_rounding_are_ranked_by_it() -> None:
    """At such sizes the noise is lost in the sum: equal logits are drawn evenly, a greater one always."""
    x_V = np.full(40, 3e38, np.float32)
    found = sample(x_V[None], [(0, DrawSettings(key, 1.0)) for key in range(4_000)])
    assert not exceeds_chi_square(np.bincount([d.token_id for d in found], minlength=40), np.full(40, 100.0))
    x_V[20] = np.nextafter(x_V[20], np.float32(np.inf))
    assert {draw(x_V, key=key).token_id for key in range(50)} == {20}


def test_greedy_takes_the_lowest_id_of_ties() -> None:
    x_V = np.zeros(VOCABULARY, np.float32)
    assert draw(x_V, temperature=0.0).token_id == 0
    x_V[[131_071, 200_000, 777]] = 4.0
    assert draw(x_V, temperature=0.0).token_id == 777
    x_V[VOCABULARY - 1] = 5.0
    assert draw(x_V, temperature=0.0).token_id == VOCABULARY - 1


@pytest.mark.parametrize("name", list(rows()))
def test_log_probabilities_agree_with_the_specification(name: str) -> None:
    x_V = rows()[name]
    logprob_V = reference.log_probabilities(x_V)
    found = draw(x_V, temperature=0.0, num_top=20)
    assert found.logprob == pytest.approx(logprob_V[found.token_id], abs=2e-6, rel=2e-7)
    wanted = reference.top_logprobs(x_V, 20)
    assert [token for token, _ in found.top] == [token for token, _ in wanted]
    lowest = float(np.finfo(np.float32).min)
    wanted_logprobs = [max(p, lowest) for _, p in wanted]
    np.testing.assert_allclose([p for _, p in found.top], wanted_logprobs, atol=2e-6, rtol=2e-7)


def test_reporting_does_not_change_the_draw() -> None:
    x_V = rows()["peaked"]
    for num_top in (-1, 0, 7):
        found = draw(x_V, key=6, top_p=0.8, num_top=num_top)
        assert found.token_id == draw(x_V, key=6, top_p=0.8).token_id
        assert (found.logprob is None) == (num_top < 0)
        assert len(found.top) == max(0, num_top)


def test_penalties_mask_and_bias_agree_with_the_specification() -> None:
    rng = np.random.default_rng(3)
    x_V = rng.normal(0, 2, 1000).astype(np.float32)
    adjust: dict[str, Any] = {
        "prompt_ids": rng.integers(0, 1000, 200).astype(np.int32),
        "answer_ids": np.unique(rng.integers(0, 1000, 100)).astype(np.int32),
        "repetition_penalty": 1.3,
        "presence_penalty": 0.7,
        "frequency_penalty": -0.4,
        "bias_ids": np.array([5, 999, 31], np.int32),
        "bias": np.array([2.5, -100, 1], np.float32),
        "allowed": rng.integers(0, 1 << 32, 32, dtype=np.uint32),
    }
    adjust["answer_counts"] = rng.integers(0, 9, len(adjust["answer_ids"])).astype(np.int32)
    wanted_V = reference.adjust_logits(x_V, **adjust)
    found = draw(x_V, num_top=300, temperature=0.0, **adjust)
    wanted = reference.top_logprobs(wanted_V, 300)
    assert [token for token, _ in found.top] == [token for token, _ in wanted]
    np.testing.assert_allclose([p for _, p in found.top], [p for _, p in wanted], atol=3e-6)
    assert found.token_id == int(wanted_V.argmax())


def test_openai_penalty_formula() -> None:
    """logit - count * frequency - (count > 0) * presence, seen through log-probability differences."""
    x_V = np.array([1.0, 2.0, 0.5, 0.0], np.float32)
    found = draw(
        x_V,
        temperature=0.0,
        num_top=4,
        answer_ids=np.array([0, 1], np.int32),
        answer_counts=np.array([3, 1], np.int32),
        presence_penalty=0.25,
        frequency_penalty=0.5,
    )
    logprob = dict(found.top)
    assert logprob[0] - logprob[3] == pytest.approx(1.0 - 3 * 0.5 - 0.25, abs=1e-6)
    assert logprob[1] - logprob[3] == pytest.approx(2.0 - 1 * 0.5 - 0.25, abs=1e-6)
    assert logprob[2] - logprob[3] == pytest.approx(0.5, abs=1e-6)


def test_mask_forbids_even_the_best_token() -> None:
    x_V = np.zeros(70, np.float32)
    x_V[3] = 50.0
    allowed = np.zeros(3, np.uint32)
    allowed[2] = 1 << 5
    for temperature in (0.0, 1.0):
        found = draw(x_V, temperature=temperature, key=9, num_top=5, allowed=allowed)
        assert found == Draw("ok", 69, 0.0, ((69, 0.0),))


def test_nan_and_nothing_allowed_are_reported() -> None:
    x_V = np.zeros(500, np.float32)
    x_V[499] = np.nan
    assert draw(x_V).status == "nan"
    assert draw(x_V, allowed=np.full(16, 1, np.uint32)).status == "nan", "a broken model, even where masked"
    assert draw(np.full(500, -np.inf, np.float32)).status == "nothing_allowed"
    found = draw(np.zeros(500, np.float32), allowed=np.zeros(16, np.uint32), num_top=3)
    assert found == Draw("nothing_allowed", -1, None, ())


def test_logits_are_not_changed() -> None:
    x_V = rows()["ties"]
    before = x_V.copy()
    draw(x_V, bias_ids=np.array([1], np.int32), bias=np.array([9], np.float32), top_p=0.5, num_top=4)
    np.testing.assert_array_equal(x_V, before)


def test_scratch_is_what_a_row_with_every_setting_takes(isa: str) -> None:
    runtime.configure(isa, threads=2)
    per_thread = sampling_scratch_bytes(VOCABULARY, 1)
    assert 16 * VOCABULARY < per_thread < 17 * VOCABULARY
    assert sampling_scratch_bytes(VOCABULARY, 3) == 3 * per_thread


def test_rows_are_independent_and_any_number_of_threads_draws_the_same(isa: str) -> None:
    rng = np.random.default_rng(9)
    logits_RV = rng.normal(0, 2, (7, 5003)).astype(np.float32)
    wishes = [(row, DrawSettings(row, 1.0, top_p=0.9 if row % 2 else 1.0, num_top=row)) for row in range(7)]
    together = sample(logits_RV, wishes)
    runtime.configure(isa, threads=1)
    assert [sample(logits_RV, [wish])[0] for wish in wishes] == together


def test_every_instruction_set_draws_the_same() -> None:
    rng = np.random.default_rng(17)
    x_V = rng.normal(0, 3, 20_011).astype(np.float32)
    wishes = [
        (0, DrawSettings(key, temperature, top_k=k, top_p=p, num_top=3))
        for temperature in (0.7, 1.0, 3.0)
        for k in (0, 100)
        for p in (0.9, 1.0)
        for key in range(20)
    ]
    found = []
    for isa in runtime.supported_isa():
        runtime.configure(isa, threads=1)
        found.append(sample(x_V[None], wishes))
    assert all(draws == found[0] for draws in found)


def test_full_vocabulary_agrees_with_the_specification() -> None:
    rng = np.random.default_rng(23)
    for scale in (0.05, 3.0):
        x_V = rng.normal(0, scale, VOCABULARY).astype(np.float32)
        choices: list[dict[str, Any]] = [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.1}]
        for filters in choices:
            kept_V = reference.keep_filtered(x_V, **{"temperature": 1.0, **filters})
            for key in range(10):
                wanted = reference.draw_token(x_V, kept_V > 0, 1.0, key)
                assert draw(x_V, key=key, **filters).token_id == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"top_k": -1}, "top_k is -1"),
        (
            {"bias_ids": np.array([100], np.int32), "bias": np.ones(1, np.float32)},
            "bias_ids holds token 100; .* 100",
        ),
        ({"prompt_ids": np.array([-1], np.int32)}, "prompt_ids holds token -1"),
        ({"answer_ids": np.array([1], np.int32)}, "answer_ids and answer_counts come together"),
        ({"bias_ids": np.array([1], np.int32), "bias": np.ones(2, np.float32)}, "differ in length"),
        ({"allowed": np.zeros(3, np.uint32)}, "too few words; expected 4"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(np.zeros(100, np.float32), **settings)


def test_wrong_arrays_are_refused() -> None:
    with pytest.raises(TypeError):
        draw(np.zeros(100, np.float64))
    with pytest.raises(TypeError):
        sample(np.zeros((4, 100), np.float32)[:, ::2], [(0, DrawSettings(0, 1.0))])
    with pytest.raises(ValueError, match="row is 4; there are 4"):
        sample(np.zeros((4, 100), np.float32), [(4, DrawSettings(0, 1.0))])
