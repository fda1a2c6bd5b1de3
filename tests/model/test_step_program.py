"""Steps that are recorded and repeated compute what the same calls from Python compute, to the bit."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from harmonium.config import KvCache, Weights
from harmonium.model import native, step_program, weights
from harmonium.model.native import NativeRunner
from tests.model.driver import Driver
from tests.model.tiny_models import tiny_checkpoint

TOKENS = np.random.default_rng(3).integers(0, 300, 400).astype(np.int32)


def num_programs(runner: NativeRunner) -> int:
    return len(runner._programs._programs)


@pytest.mark.parametrize("kv_cache", ["bf16", "int8"])
@pytest.mark.parametrize("dense", ["int8", "bf16"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_recorded_steps_have_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, dense: Weights, kv_cache: KvCache, chunk: int
) -> None:
    recorded = NativeRunner(tiny_checkpoint("narrow"), dense, kv_cache=kv_cache)
    found = Driver(recorded, seed=1).run(TOKENS, chunk)
    assert num_programs(recorded) >= 1
    monkeypatch.setattr(native, "MAX_RECORDED_TOKENS", 0)
    plain = NativeRunner(tiny_checkpoint("narrow"), dense, kv_cache=kv_cache)
    np.testing.assert_array_equal(found, Driver(plain, seed=1).run(TOKENS, chunk))
    assert num_programs(plain) == 0


def test_sequences_that_come_and_go_each_find_their_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of steps in turn, and block tables that grow: no step sees numbers of another."""
    rng = np.random.default_rng(5)
    steps = []
    for _ in range(120):
        names = rng.choice(["a", "b", "c"], rng.integers(1, 4), replace=False)
        steps.append({str(name): rng.integers(0, 300, rng.integers(1, 5)).astype(np.int32) for name in names})

    def run() -> list[np.ndarray]:
        driver = Driver(NativeRunner(tiny_checkpoint("narrow")), seed=2)
        return [logits for step in steps for logits in driver.feed(step).values()]

    recorded = run()
    monkeypatch.setattr(native, "MAX_RECORDED_TOKENS", 0)
    for found, expected in zip(recorded, run(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_contexts_need_a_program_each_time_they_double() -> None:
    runner = NativeRunner(tiny_checkpoint("narrow"))
    driver = Driver(runner)
    driver.run(TOKENS[:255], 1)
    assert num_programs(runner) == 1  # tables of 8 blocks
    driver.run(TOKENS[255:300], 1)
    assert num_programs(runner) == 2


def test_programs_are_made_anew_when_experts_have_been_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on = threading.Event()
    real = weights.pack_mxfp4
    monkeypatch.setattr(weights, "pack_mxfp4", lambda *arrays: may_go_on.wait(30) and real(*arrays))
    runner = NativeRunner(tiny_checkpoint("narrow"), packs_experts=True)
    driver = Driver(runner)
    before = driver.run(TOKENS[:20], 1)
    assert num_programs(runner) == 1
    may_go_on.set()
    runner.wait_until_resident()
    after = driver.run(TOKENS[20:40], 1)
    assert num_programs(runner) == 2
    plain = Driver(NativeRunner(tiny_checkpoint("narrow"))).run(TOKENS[:40], 1)
    np.testing.assert_array_equal(np.concatenate([before, after]), plain)


def test_prompts_are_not_recorded_and_programs_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_program, "MAX_PROGRAMS", 2)
    runner = NativeRunner(tiny_checkpoint("narrow"))
    driver = Driver(runner)
    driver.run(TOKENS[:50], 50)
    assert num_programs(runner) == 0
    driver.step({"": TOKENS[50:53]}, rows=[2])  # only one row gets logits
    assert num_programs(runner) == 0
    for size in (1, 2, 3, 4):
        driver.step({"": TOKENS[:size]})
    assert num_programs(runner) == 2
    runner.close()
    assert num_programs(runner) == 0


def test_blocks_that_are_not_there_are_found_when_a_program_runs() -> None:
    """Whatever may change is checked at every run; the program is good for the next one."""
    runner = NativeRunner(tiny_checkpoint("narrow"))
    driver = Driver(runner)
    before = driver.run(TOKENS[:40], 1)
    table = driver._sequences[""].full
    there, table[0] = table[0], 10_000
    with pytest.raises(ValueError, match=r"block\[0, 0\] is 10000; expected 0 to 63"):
        driver.feed({"": TOKENS[40:41]})
    table[0] = there
    other = Driver(NativeRunner(tiny_checkpoint("narrow")))
    np.testing.assert_array_equal(before, other.run(TOKENS[:40], 1))
    driver._sequences[""].length -= 1
    np.testing.assert_array_equal(driver.feed({"": TOKENS[40:41]})[""], other.feed({"": TOKENS[40:41]})[""])
