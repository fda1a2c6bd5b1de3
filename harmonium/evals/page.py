"""The report as one HTML file: no script, nothing from elsewhere, and no text that could become markup."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from harmonium.evals.item import EFFORTS
from harmonium.evals.plots import Bar, accuracy_plot, token_plot
from harmonium.evals.published import SOURCE
from harmonium.evals.report import INTERVAL_NOTE, Report, amount, duration, interval, percent, share
from harmonium.evals.samples import Sample

MAX_SHOWN = 60
"""Wrong answers and errors that are shown; all are in samples.jsonl."""
MAX_SHOWN_CHARS = 2_000

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_STYLE_FILE = Path(__file__).with_name("report.css")


def page(report: Report) -> str:
    """The whole file."""
    settings = report.settings
    done = sum(1 for sample in report.samples if sample.result != "error")
    state = (
        "" if done == report.planned else f' <span class="warn">{done:,} of {report.planned:,} samples</span>'
    )
    body = [
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="soft">{escape(str(settings["model"]))} · harmonium {settings["version"]}{state}</p>',
        _accuracy_section(report),
        _results(report),
        _groups(report),
        _token_section(report),
        _published_table(report),
        _wrong(report),
        _settings(report),
    ]
    title = escape(f"{report.title}: {settings['model']}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{title}</title><style>{_STYLE_FILE.read_text(encoding='utf-8')}</style></head>\n<body>\n{''.join(body)}\n</body></html>\n"
    )


def _accuracy_section(report: Report) -> str:
    bars = [
        Bar(
            f"this run, {row.effort}",
            100 * row.accuracy.value,
            100 * row.accuracy.low,
            100 * row.accuracy.high,
            "ours",
        )
        for row in report.summaries
        if row.accuracy is not None and (row.effort != "all" or not report.published)
    ]
    same = _same_model(str(report.settings["model"]))
    for figure in report.published:
        kind = "same" if figure.model == same else "theirs"
        label = f"{figure.model} {figure.effort}".strip()
        bars.append(Bar(label, figure.percent, None, None, kind, figure.remark))
    if not bars:
        return '<p class="warn">No sample was judged.</p>'
    key = '<p class="key soft"><span style="background:var(--ours)"></span>measured, with its 95 % interval'
    if report.published:
        if same:
            key += '<span style="background:var(--same)"></span>published, this model'
        key += '<span style="background:var(--theirs)"></span>published, other models'
    return f"<h2>Accuracy</h2>{accuracy_plot(bars)}{key}</p>"


def _same_model(name: str) -> str:
    """The published model that this name means; "" for another."""
    size = next((size for size in ("120b", "20b") if f"gpt-oss-{size}" in name.lower()), None)
    return f"gpt-oss-{size}" if size else ""


def _results(report: Report) -> str:
    head = ("effort", "items", "samples", "accuracy", "95 %", "cut off", "empty", "errors")
    rows = [
        (
            escape(row.effort),
            f"{row.items:,}",
            f"{row.samples:,}",
            f"<b>{percent(row.accuracy)}</b>",
            interval(row.accuracy),
            _warned(row.truncated, row.samples),
            _warned(row.empty, row.samples),
            _warned(row.errors, 0),
        )
        for row in report.summaries
    ]
    note = (
        "Cut off and empty answers count as wrong (one that was cut off in its reasoning is both); errors "
        f"are not judged, --resume asks them again. {INTERVAL_NOTE}."
    )
    return f"<h2>Results</h2>{_table(head, rows)}<p class='soft'>{escape(note)}</p>{_speed(report)}"


def _speed(report: Report) -> str:
    head = (
        "effort",
        "tokens",
        "reasoning",
        "answer",
        "longest",
        "tok/s each",
        "in all",
        "first token",
        "time",
    )
    rows = [
        (
            escape(row.effort),
            amount(row.completion_tokens),
            amount(row.reasoning_tokens),
            amount(row.answer_tokens),
            amount(row.longest_tokens),
            amount(row.tokens_per_second, 1),
            amount(row.total_tokens_per_second, 1),
            f"{row.first_token_seconds:.2f} s" if row.first_token_seconds is not None else "-",
            duration(row.seconds),
        )
        for row in report.summaries
    ]
    note = (
        "Tokens are means of a sample. Tokens a second of each sample and its first token are medians, with "
        "the waiting for a place among others; in all: every token over the time in which any sample "
        "was being answered."
    )
    if not all(row.is_reasoning_counted for row in report.summaries):
        note += " The server does not count reasoning tokens: they were counted from its text."
    return f"<h2>Tokens and speed</h2>{_table(head, rows)}<p class='soft'>{escape(note)}</p>"


def _warned(count: int, total: int) -> str:
    text = share(count, total)
    return f'<span class="warn">{text}</span>' if count else text


def _groups(report: Report) -> str:
    if not report.summaries or len(report.summaries[-1].groups) < 2:
        return ""
    efforts = [row for row in report.summaries if row.effort != "all"]
    head = [
        report.group_name,
        "samples",
        "accuracy",
        "95 %",
        *(row.effort for row in efforts if len(efforts) > 1),
    ]
    rows = []
    for group in report.summaries[-1].groups:
        cells = [
            escape(group.name),
            f"{group.samples:,}",
            f"<b>{percent(group.accuracy)}</b>",
            interval(group.accuracy),
        ]
        if len(efforts) > 1:
            by_name = [{g.name: g for g in row.groups} for row in efforts]
            cells += [
                percent(groups[group.name].accuracy) if group.name in groups else "-" for groups in by_name
            ]
        rows.append(cells)
    return f"<h2>By {escape(report.group_name)}</h2>{_table(head, rows)}"


def _token_section(report: Report) -> str:
    parts = []
    for effort in EFFORTS:
        plot = token_plot([s for s in report.samples if s.effort == effort], report.samples)
        if plot:
            parts.append(f"<h3>{effort}</h3>{plot}")
    if not parts:
        return ""
    key = (
        '<p class="key soft"><span style="background:var(--ours)"></span>samples by their tokens, '
        'reasoning included<span style="background:var(--bad)"></span>cut off</p>'
    )
    return f"<h2>Tokens of a sample</h2>{''.join(parts)}{key}"


def _published_table(report: Report) -> str:
    if not report.published:
        return "<h2>Published figures</h2><p class='soft'>OpenAI's model card has none for this task.</p>"
    models = dict.fromkeys(figure.model for figure in report.published)
    rows = []
    for model in models:
        figures = {figure.effort: figure for figure in report.published if figure.model == model}
        cells = [f"{figures[e].percent:.1f} %" if e in figures else "" for e in (*EFFORTS, "")]
        rows.append((escape(model), *cells, escape(" ".join(f.remark for f in figures.values()).strip())))
    table = _table(("model", *EFFORTS, "effort not stated", ""), rows)
    return f"<h2>Published figures</h2>{table}<p class='soft'>{escape(SOURCE)}</p>"


def _wrong(report: Report) -> str:
    missed = [sample for sample in report.samples if sample.result != "right"]
    if not missed:
        return ""
    shown = missed[:MAX_SHOWN]
    more = (
        f"<p class='soft'>{len(missed) - len(shown):,} more are in samples.jsonl.</p>"
        if len(missed) > len(shown)
        else ""
    )
    return f"<h2>Not right: {len(missed):,}</h2>{''.join(_sample(sample) for sample in shown)}{more}"


def _sample(sample: Sample) -> str:
    why = sample.error or sample.note or f"answered {_short(sample.extracted, 80)}"
    head = f"{sample.id} · {sample.effort}" + (f" · sample {sample.number + 1}" if sample.number else "")
    parts = [f"<summary>{escape(head)} <span class='soft'>{escape(_short(why, 160))}</span></summary>"]
    parts.append(_block("expected", sample.expected))
    if sample.reply is not None:
        for name, arguments in sample.reply.tool_calls:
            parts.append(_block("call", f"{name}({arguments})"))
        parts.append(_block("answer", sample.reply.content))
        parts.append(_block("reasoning (not judged)", sample.reply.reasoning))
    return f"<details>{''.join(parts)}</details>"


def _block(name: str, value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"<h3>{escape(name)}</h3><pre>{escape(_short(text, MAX_SHOWN_CHARS))}</pre>"


def _short(text: str | None, limit: int) -> str:
    text = text or "(nothing)"
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text):,} characters)"


def _settings(report: Report) -> str:
    rows = [
        (escape(name), escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
        for name, value in report.settings.items()
    ]
    return f"<h2>Settings</h2>{_table(('', ''), rows)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """head: text. rows: markup."""
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{cells}</tbody></table></div>'
