from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harmonium.bench import BenchOptions, BenchReport, BenchRow, print_report, run_bench
from harmonium.config import EngineConfig
from harmonium.errors import ConfigError
from harmonium.testing import make_tiny_checkpoint

SMALL: dict[str, Any] = {
    "prefill": (40,),
    "decode": 4,
    "depth": (0, 20),
    "batch": (2, 1),
    "repetitions": 2,
    "buffer_bytes": 1 << 20,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("bench") / "tiny", vocabulary_size=500)


def options(model: Path, **changes: Any) -> BenchOptions:
    return BenchOptions(model, EngineConfig(threads=1), **{**SMALL, **changes})


def test_every_row_is_measured_and_held_against_the_machine(tiny: Path) -> None:
    told: list[str] = []
    report = run_bench(options(tiny), told.append)
    assert [(row.kind, row.depth, row.batch) for row in report.rows] == [
        ("prefill", 0, 1),
        ("decode", 0, 1),
        ("decode", 0, 2),
        ("decode", 20, 1),
        ("decode", 20, 2),
    ]
    for row in report.rows:
        assert 0 < row.low <= row.tokens_per_second <= row.high
        assert row.limit > row.tokens_per_second, "nothing is faster than the machine"
        assert row.share == row.tokens_per_second / row.limit
        assert row.depth <= row.context < report.context_length
    assert 0 < report.load_seconds < report.ready_seconds
    assert report.read_bandwidth_low <= report.read_bandwidth <= report.read_bandwidth_high
    assert report.int8_operations > 1e8
    assert 1 << 24 < report.peak_resident_bytes < 1 << 34
    assert report.threads == 1 and report.weights == "int8" and report.num_preemptions == 0
    assert any("loading" in line for line in told) and any("2 x 4 at 20" in line for line in told)


def test_json_round_trips_and_the_table_shows_every_row(tiny: Path) -> None:
    report = run_bench(options(tiny, depth=(0,), batch=(1,)))
    record = json.loads(json.dumps(report.to_json()))
    assert [row["share"] for row in record["rows"]] == [row.share for row in report.rows]
    assert record["read_bandwidth"] == report.read_bandwidth
    out = io.StringIO()
    print_report(report, out)
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines[4:]] == ["prefill", "decode"]
    assert "1 threads" in lines[0] and "GB/s" in lines[2]


def test_rows_may_be_left_out(tiny: Path) -> None:
    report = run_bench(options(tiny, prefill=(), depth=()))
    assert report.rows == () and report.ready_seconds > 0


def test_table_tells_of_preemptions() -> None:
    row = BenchRow("decode", 64, 0, 1, 30.0, 10.0, 9.0, 11.0, 20.0, "bandwidth")
    report = BenchReport("m", "int8", "avx2", 2, 99, 1.0, 2.0, 1 << 30, 1e9, 1e9, 2e9, 1e11, 3, (row,))
    out = io.StringIO()
    print_report(report, out)
    assert "3 preemptions" in out.getvalue() and " 50%" in out.getvalue()
    out = io.StringIO()
    print_report(replace(report, num_preemptions=0), out)
    assert "preemption" not in out.getvalue()


def test_context_is_made_to_hold_the_longest_row(tiny: Path) -> None:
    wish = options(tiny, prefill=(3000,), depth=(100,))
    assert wish.least_context() == 3001
    assert wish.engine_config(10_000).context_length == 4096
    assert wish.engine_config(3500).context_length == 3500
    assert replace(wish, prefill=(9000,)).engine_config(10_000).context_length == 9001
    assert options(tiny, batch=(40,)).engine_config(10_000).max_sequences == 40
    with pytest.raises(ConfigError, match="context_length is 64; the longest of these rows needs 3,001"):
        replace(wish, config=EngineConfig(context_length=64)).engine_config(10_000)
    with pytest.raises(ConfigError, match=r"the model.s context is 2,000; .* needs 3,001"):
        wish.engine_config(2000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefill": (0,)}, "prefill is 0; expected at least 1"),
        ({"decode": 0}, "decode is 0"),
        ({"depth": (-1,)}, "depth is -1; expected at least 0"),
        ({"batch": (1, 0)}, "batch is 0"),
        ({"repetitions": 0}, "repetitions is 0"),
    ],
)
def test_values_out_of_range_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(tmp_path, **changes)


def test_a_missing_checkpoint_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        run_bench(options(tmp_path / "nowhere"))
