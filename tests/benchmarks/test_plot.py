"""plot.py on a result that compare.py really wrote: the demo model beside two peers, two rounds."""

from __future__ import annotations

import importlib
import json
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("matplotlib")

RESULT = Path(__file__).parent / "compare_result.json"


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("plot")


def changed(folder: Path, name: str, change: dict[str, Any]) -> Path:
    path = folder / name
    path.write_text(json.dumps({**json.loads(RESULT.read_text()), **change}))
    return path


def drawn(plot: ModuleType, result: Path, kind: str) -> Any:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    assert plot.PLOTS[kind](axes, plot.read([result]))
    return axes


def test_each_question_has_a_picture(plot: ModuleType, tmp_path: Path, capsys: Any) -> None:
    assert plot.main([str(RESULT), "--out", str(tmp_path / "plots")]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in paths] == [
        *("prefill.png", "decode.png", "batch.png", "first-token.png", "memory.png"),
    ]
    for path in paths:
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert width >= 1000 and height >= 600, "readable in print"


def test_points_are_the_medians_with_their_extremes(plot: ModuleType) -> None:
    rows = [row for row in json.loads(RESULT.read_text())["rows"] if row["kind"] == "prefill"]
    axes = drawn(plot, RESULT, "prefill")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["128", "512"]
    containers = {container.get_label(): container for container in axes.containers}
    assert list(containers) == ["ours", "ik_llama.cpp", "llama.cpp"]
    for side, container in containers.items():
        line, _, (bars,) = container.lines
        assert list(line.get_ydata()) == [row["sides"][side]["median"] for row in rows]
        ends = [[float(end) for end in segment[:, 1]] for segment in bars.get_segments()]
        found = [row["sides"][side] for row in rows]
        assert ends == [pytest.approx([one["low"], one["high"]]) for one in found]
    limit = next(line for line in axes.get_lines() if line.get_label() == "machine's limit")
    assert list(limit.get_ydata()) == [row["limit"] for row in rows]


def test_sides_differ_without_color(plot: ModuleType) -> None:
    assert len({style["marker"] for style in plot.STYLES}) == len(plot.STYLES)
    assert len({style["linestyle"] for style in plot.STYLES}) == len(plot.STYLES)
    assert len(set(plot.HATCHES)) == len(plot.STYLES)


def test_a_side_without_a_row_has_no_bar(plot: ModuleType) -> None:
    axes = drawn(plot, RESULT, "first-token")
    assert [len(container) for container in axes.containers] == [3, 2, 2], "only ours restarts"
    assert axes.get_yscale() == "log"


def test_a_question_without_rows_gets_no_file(plot: ModuleType, tmp_path: Path, capsys: Any) -> None:
    rows = [row for row in json.loads(RESULT.read_text())["rows"] if row["kind"] == "peak"]
    result = changed(tmp_path, "peak.json", {"rows": rows})
    assert plot.main([str(result), "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.glob("*.png")] == ["memory.png"]


def test_later_files_replace_rows_and_add_sides(plot: ModuleType, tmp_path: Path) -> None:
    row = next(row for row in json.loads(RESULT.read_text())["rows"] if row["kind"] == "peak")
    row["sides"] = {"ours": {**row["sides"]["ours"], "median": 7.0}, "vLLM": row["sides"]["ours"]}
    later = changed(tmp_path, "later.json", {"rows": [row], "sides": {"ours": {}, "vLLM": {}}})
    results = plot.read([RESULT, later])
    assert results.sides == ["ours", "ik_llama.cpp", "llama.cpp", "vLLM"]
    assert results.of("peak")[0]["sides"]["ours"]["median"] == 7.0 and results.of("prefill")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "is no result of"),
        ('{"rows": [{}]}', "is no result of"),
        ("[]", "is no"),
    ],
)
def test_what_cannot_be_read_is_said(
    plot: ModuleType, tmp_path: Path, capsys: Any, content: str | None, message: str
) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    assert plot.main([str(path), "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
