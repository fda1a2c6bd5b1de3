"""The kernels' instruction counts: the check itself, and what it counts with."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from harmonium.kernels import runtime

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# Of callgrind's format: costs of two objects, one of them a call whose cost is inclusive.
DUMP = """\
# callgrind format
events: Ir
ob=(1) /usr/lib/libpython.so
fl=(1)
fn=(1) call
0 100
cob=(2) /somewhere/harmonium/_native.cpython-311-x86_64-linux-gnu.so
cfn=(2)
calls=1 0
0 77000
ob=(2)
fn=(2)
0 2000
+3 30
cfn=(3)
calls=2 0
* 50000
ob=(3) /lib/libm.so.6
0 400
ob=(2)
fn=(3)
-2 5

totals: 2535
"""


@pytest.fixture
def instructions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("instructions")


@pytest.mark.slow
def test_no_kernel_executes_more_instructions_than_written_down() -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "instructions.py"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, f"{done.stderr}\nif that is meant: python benchmarks/instructions.py --write"
    assert len(done.stdout.splitlines()) >= 60


def test_own_cost_of_the_module_counts_and_nothing_else(instructions: ModuleType) -> None:
    assert instructions.native_cost(DUMP) == 2000 + 30 + 5


def test_growth_over_the_tolerance_is_named_and_less_is_not(instructions: ModuleType) -> None:
    written = {
        "compiler": instructions.compiler(),
        "counts": {"scalar: a": 100_000, "scalar: b": 100_000, "scalar: c": 100_000, "avx2: a": 7},
    }
    counts = {"scalar: a": 103_600, "scalar: b": 103_400, "scalar: c": 50_000}
    assert instructions.grown(counts, written) == ["scalar: a: 103,600 instructions, 100,000 before (+3.6%)"]


def test_a_case_that_is_new_or_gone_asks_for_new_counts(instructions: ModuleType) -> None:
    written = {"compiler": instructions.compiler(), "counts": {"scalar: old": 1}}
    lines = instructions.grown({"scalar: new": 1}, written)
    assert [line.split(" is ")[0] for line in lines] == ["scalar: new:", "scalar: old:"]


def test_counts_of_another_compiler_are_not_compared(instructions: ModuleType) -> None:
    with pytest.raises(instructions.CannotCount, match=r"the counts are of GCC: \(none\) 1.0; this module"):
        instructions.grown({"scalar: a": 1}, {"compiler": "GCC: (none) 1.0", "counts": {}})


def test_valgrind_that_fails_is_no_reason_to_skip(
    instructions: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert instructions.main([]) == 2
    assert "valgrind is not installed" in capsys.readouterr().err
    fake = tmp_path / "valgrind"
    fake.write_text(f"#!{sys.executable}\nraise SystemExit('no such tool')")
    fake.chmod(0o755)
    assert instructions.main([]) == 3
    assert "valgrind ended with 1: no such tool" in capsys.readouterr().err


def test_every_case_runs_and_has_a_name_of_its_own(instructions: ModuleType) -> None:
    cases = list(importlib.import_module("kernel_cases").all_cases())
    before = runtime.current_isa(), runtime.current_threads()
    try:
        runtime.configure("scalar", 1)
        for _, run in cases:
            run()
    finally:
        runtime.configure(*before)
    assert len({name for name, _ in cases}) == len(cases) >= 30
