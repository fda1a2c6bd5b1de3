"""Intervals and summaries say what the samples say."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import pytest

from harmonium.evals.intervals import accuracy, wilson
from harmonium.evals.item import Item, Reply, Verdict
from harmonium.evals.page import page
from harmonium.evals.published import published
from harmonium.evals.report import duration, make_report
from harmonium.evals.samples import Result, Sample, failed, judged
from harmonium.evals.summary import busy_seconds, summarize

SETTINGS: dict[str, Any] = {"model": "gpt-oss-20b", "version": "1"}


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        # Wilson's interval as published tables and other programs give it (statsmodels, R's binom).
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson_interval(right: int, count: int, low: float, high: float) -> None:
    found = wilson(right / count, count)
    assert found == pytest.approx((low, high), abs=1e-4)


def test_one_sample_an_item_is_plain_wilson() -> None:
    found = accuracy([(1, 1)] * 7 + [(0, 1)] * 3)
    assert found is not None
    assert (found.value, found.effective) == (0.7, 10)
    assert (found.low, found.high) == wilson(0.7, 10)


def test_samples_that_agree_count_as_one() -> None:
    """Eight answers to each question, always all right or all wrong: no more is known than from one each."""
    found = accuracy([(8, 8)] * 6 + [(0, 8)] * 4)
    assert found is not None
    assert found.effective == 10
    assert (found.low, found.high) == wilson(0.6, 10)


def test_samples_that_are_independent_count_each() -> None:
    draw = random.Random(0)
    items = [(sum(draw.random() < 0.5 for _ in range(16)), 16) for _ in range(400)]
    found = accuracy(items)
    assert found is not None
    assert 400 * 16 * 0.8 < found.effective <= 400 * 16


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Items of different difficulty, four samples each: 95 % of such runs should cover the mean."""
    draw, covered, runs = random.Random(1), 0, 400
    for _ in range(runs):
        items = [(sum(draw.random() < p for _ in range(4)), 4) for p in (draw.random() for _ in range(60))]
        found = accuracy(items)
        assert found is not None
        covered += found.low <= 0.5 <= found.high
    assert 0.92 < covered / runs <= 0.99


@pytest.mark.parametrize("items", [[], [(0, 0)]])
def test_nothing_judged_has_no_accuracy(items: list[tuple[int, int]]) -> None:
    assert accuracy(items) is None


def test_items_count_alike_however_many_samples_they_have() -> None:
    found = accuracy([(4, 4), (0, 1)])
    assert found is not None and found.value == 0.5


def sample(result: Result, effort: Any = "low", name: str = "i", number: int = 0, **reply: Any) -> Sample:
    item = Item(name, "g", (), "x")
    if result == "error":
        return failed(item, effort, number, "gone")
    return judged(item, effort, number, Reply("text", **reply), Verdict(result == "right", "x"))


def test_summary_counts_each_sample_once() -> None:
    samples = [
        sample("right", completion_tokens=10, reasoning_tokens=6, seconds=2.0, first_token_seconds=0.5),
        sample(
            "wrong", name="j", completion_tokens=30, reasoning_tokens=30, seconds=2.0, finish_reason="length"
        ),
        sample("error", name="k"),
        sample("right", effort="high", completion_tokens=100, reasoning_tokens=90, seconds=4.0, retries=2),
    ]
    low, high, whole = summarize(samples)
    assert (low.items, low.samples, low.right, low.truncated, low.errors) == (3, 2, 1, 1, 1)
    assert (low.completion_tokens, low.reasoning_tokens, low.answer_tokens, low.longest_tokens) == (
        20,
        18,
        2,
        30,
    )
    assert low.tokens_per_second == 10
    assert (high.effort, high.retries) == ("high", 2)
    assert (whole.effort, whole.samples, whole.errors) == ("all", 3, 1)


def test_server_that_counts_nothing_has_no_speed() -> None:
    (low,) = summarize([sample("right")])
    assert (low.completion_tokens, low.tokens_per_second, low.total_tokens_per_second) == (None, None, None)


def test_time_between_two_sessions_is_not_counted() -> None:
    assert busy_seconds([(0, 2), (1, 3), (100, 101)]) == 4
    assert busy_seconds([]) == 0


@pytest.mark.parametrize(("seconds", "text"), [(3.2, "3 s"), (600, "10 min"), (3 * 3600 + 300, "3 h 05 min")])
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_published_figures_are_those_of_the_model_card() -> None:
    """Spot checks against Table 3 and Figure 1 of arXiv 2508.10925v1."""
    found = {
        (task, f.model, f.effort): f.percent for task in ("aime25", "gpqa", "mmlu") for f in published(task)
    }
    assert found["aime25", "gpt-oss-20b", "high"] == 91.7
    assert found["gpqa", "gpt-oss-120b", "medium"] == 73.1
    assert found["mmlu", "o4-mini", ""] == 93.0
    assert published("gsm8k") == published("demo") == []
    assert {f.remark for f in published("aime24") if f.model == "o3"} == {"with tools"}


def test_page_is_whole_for_every_kind_of_run() -> None:
    many = [
        sample("right" if n % 3 else "wrong", effort, f"i{n}", completion_tokens=2**n, reasoning_tokens=0)
        for n in range(17)
        for effort in ("low", "high")
    ]
    for samples in ([], [sample("error")], [sample("right")], many):
        report = make_report("gpqa", "GPQA", "domain", SETTINGS, 40, samples)
        text = page(report)
        assert text.count("<svg") == text.count("</svg>")
        for tag in ("table", "details", "pre", "p", "h2"):
            assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag
        assert not re.search(r"\b(?:nan|inf|None)\b", text)
        assert "80.1" in text  # the published figure stands beside it
    assert math.isfinite(report.summaries[0].seconds)
