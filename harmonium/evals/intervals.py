"""Confidence intervals of an accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""Two-sided 95 % of the normal distribution."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """value, low, high: from 0 to 1; the interval is of 95 %. effective: how many independent samples the
    interval counts for: one an item when the samples of an item agree, all of them when they do not hang
    together.
    """

    value: float
    low: float
    high: float
    effective: float


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's score interval of 95 % for a share of `count` independent trials (E. B. Wilson, 1927).

    Unlike the normal approximation it stays between 0 and 1 and has a width where all or none are right.
    """
    if count <= 0:
        return 0.0, 1.0
    square = Z_95**2
    center = (share + square / (2 * count)) / (1 + square / count)
    half = Z_95 / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return max(0.0, center - half), min(1.0, center + half)


def accuracy(right_by_item: Sequence[tuple[int, int]]) -> Accuracy | None:
    """pass@1 and its interval, with the samples of an item as one cluster.

    right_by_item: (right samples, samples) of each item. The value is the mean over items of the share of
    right samples. The interval is Wilson's at the effective number of samples: p(1 - p) over the variance of
    that mean, which is taken from the spread between items (the clustered standard error), and kept between
    the number of items and of samples. With one sample an item this is Wilson's interval as it is. None for
    no samples.
    """
    shares = [right / count for right, count in right_by_item if count]
    if not shares:
        return None
    items, samples = len(shares), sum(count for _, count in right_by_item)
    mean = sum(shares) / items
    effective = float(items)
    if samples > items > 1 and 0 < mean < 1:
        variance = sum((share - mean) ** 2 for share in shares) / (items - 1) / items
        effective = min(mean * (1 - mean) / variance, samples) if variance > 0 else float(samples)
        effective = max(effective, float(items))
    low, high = wilson(mean, effective)
    return Accuracy(mean, low, high, effective)
