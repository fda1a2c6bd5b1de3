"""Plots of the report, as SVG that takes its colors from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from harmonium.evals.samples import Sample

_WIDTH, _LABELS, _RIGHT, _ROW = 760, 210, 90, 24


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of the accuracy plot, in percent. low, high: the interval, None for published figures.
    kind: "ours", "same" (published, of the same model) or "theirs".
    """

    label: str
    value: float
    low: float | None
    high: float | None
    kind: str
    remark: str = ""


def accuracy_plot(bars: Sequence[Bar]) -> str:
    """Horizontal bars from 0 to 100 %, with whiskers where there is an interval."""
    height = _ROW * len(bars) + 34
    parts = [
        _svg_start(height, "Accuracy in percent: " + "; ".join(f"{b.label} {b.value:.1f}" for b in bars))
    ]
    bottom = height - 26
    for tick in range(0, 101, 20):
        x = _x(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="2" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick} %</text>')
    for place, bar in enumerate(bars):
        parts.append(_bar(bar, place * _ROW + 4))
    return "".join([*parts, "</svg>"])


def _bar(bar: Bar, y: float) -> str:
    middle = y + 8
    width = _x(bar.value) - _x(0)
    parts = [
        f'<text class="label" x="{_LABELS - 8}" y="{middle + 4}" text-anchor="end">'
        f"{escape(bar.label)}</text>",
        f'<rect class="bar {bar.kind}" x="{_x(0):.1f}" y="{y}" width="{max(width, 1):.1f}" '
        'height="16" rx="2"/>',
    ]
    end = bar.value
    if bar.low is not None and bar.high is not None:
        low, high, end = _x(bar.low), _x(bar.high), bar.high
        parts.append(
            f'<path class="whisker" d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 5}v10'
            f'M{high:.1f} {middle - 5}v10"/>'
        )
    told = f"{bar.value:.1f}" + (f" {bar.remark}" if bar.remark else "")
    parts.append(f'<text class="value" x="{_x(end) + 6:.1f}" y="{middle + 4}">{escape(told)}</text>')
    return "".join(parts)


def _x(percent: float) -> float:
    return _LABELS + (_WIDTH - _LABELS - _RIGHT) * percent / 100


def token_plot(samples: Sequence[Sample], scale: Sequence[Sample]) -> str:
    """How many samples took how many tokens, in steps of a factor of the square root of 2; cut ones marked.

    scale: the samples whose range the axis covers, so that several plots can be compared. "" where the server
    counted no tokens.
    """
    steps = [_step(sample) for sample in samples]
    reached = [step for sample in scale if (step := _step(sample)) is not None]
    if not reached or all(step is None for step in steps):
        return ""
    first, columns = min(reached), max(reached) - min(reached) + 1
    whole, cut = [0] * columns, [0] * columns
    for step, sample in zip(steps, samples, strict=True):
        if step is not None and sample.reply is not None:
            (cut if sample.reply.is_truncated else whole)[step - first] += 1
    top = max(a + b for a, b in zip(whole, cut, strict=True))
    return _histogram(first, whole, cut, top)


def _step(sample: Sample) -> int | None:
    tokens = sample.reply.completion_tokens if sample.reply is not None else None
    return math.floor(2 * math.log2(tokens)) if tokens else None


def _histogram(first: int, whole: Sequence[int], cut: Sequence[int], top: int) -> str:
    left, height, bottom = 46, 170, 140
    width = min(64.0, (_WIDTH - left - 20) / len(whole))
    parts = [_svg_start(height, f"Tokens of an answer: {sum(whole)} whole, {sum(cut)} cut off")]
    parts.append(
        f'<line class="axis" x1="{left}" y1="{bottom}" x2="{left + width * len(whole):.1f}" y2="{bottom}"/>'
    )
    parts.append(f'<text class="tick" x="{left - 6}" y="14" text-anchor="end">{top:,}</text>')
    parts.append(f'<text class="tick" x="{left - 6}" y="{bottom}" text-anchor="end">0</text>')
    every = max(1, math.ceil(46 / width))
    for place, (count, cut_count) in enumerate(zip(whole, cut, strict=True)):
        x = left + place * width
        y = float(bottom)
        for kind, number in (("ours", count), ("bad", cut_count)):
            size = 128 * number / top
            y -= size
            if number:
                tokens = f"{_tokens(first + place)} to {_tokens(first + place + 1)} tokens: {number:,}"
                parts.append(
                    f'<rect class="bar {kind}" x="{x + 1:.1f}" y="{y:.1f}" width="{width - 2:.1f}" '
                    f'height="{size:.1f}"><title>{tokens}{" cut off" if kind == "bad" else ""}</title></rect>'
                )
    for place in range(0, len(whole) + 1, every):
        x = left + place * width
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{_tokens(first + place)}</text>"
        )
    return "".join([*parts, "</svg>"])


def _tokens(step: int) -> str:
    return f"{round(2 ** (step / 2)):,}"


def _svg_start(height: int, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    )
