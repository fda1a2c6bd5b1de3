from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.checkpoint import open_checkpoint
from harmonium.config import KvCache, Weights
from harmonium.errors import CheckpointError, EngineClosed
from harmonium.kernels.runtime import configure, current_isa, current_threads, supported_isa
from harmonium.model.batch import RowSampling, SamplingParams
from harmonium.model.memory import block_bytes, dense_bytes, step_scratch_bytes
from harmonium.model.native import NativeRunner
from harmonium.model.reference import ReferenceModel
from harmonium.model.runner import Runner
from tests.model.driver import Driver
from tests.model.rounded_reference import (
    Bf16Reference,
    Int8CacheReference,
    Int8Reference,
    row_errors,
    typical_error,
)
from tests.model.tiny_models import (
    CONFIGS,
    kept_positions,
    prompt,
    tiny_checkpoint,
    tiny_folder,
)

Logits = npt.NDArray[Any]
WEIGHTS: tuple[Weights, ...] = ("bf16", "int8")

# Typical errors, as docs/numerics.md states and explains them. UNEXPLAINED: from the reference with the same
# roundings put in. SAME: between two ways of computing the same; sums in another order flip roundings.
LARGEST_ERROR = {"bf16": 0.02, "int8": 0.05}
LARGEST_INT8_CACHE_ERROR = 0.03
UNEXPLAINED = {"bf16": 0.006, "int8": 0.02}
SAME = {"bf16": 0.006, "int8": 0.02}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(Path(__file__).parents[1] / "golden" / "logits.npz") as archive:
        return dict(archive)


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    isa, threads = current_isa(), current_threads()
    yield
    configure(isa, threads)


def runner_for(name: str, weights: Weights, max_batch_tokens: int = 512) -> NativeRunner:
    return NativeRunner(tiny_checkpoint(name), weights, max_batch_tokens)


def native_logits(name: str, weights: Weights, tokens: npt.NDArray[np.int32], chunk: int = 512) -> Logits:
    runner = runner_for(name, weights, chunk)
    return Driver(runner, len(tokens) // 32 + 2, seed=1).run(tokens, chunk)


@pytest.mark.parametrize("length", [1, 7, 129, 300])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_agree_with_the_reference(name: str, weights: Weights, length: int) -> None:
    tokens = prompt(name, length)
    expected = ReferenceModel(tiny_checkpoint(name)).logits(tokens)
    assert typical_error(native_logits(name, weights, tokens), expected) < LARGEST_ERROR[weights]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_agree_with_transformers_past_the_original_context(
    name: str, weights: Weights, golden: dict[str, Any]
) -> None:
    logits = native_logits(name, weights, prompt(name, 5000))[kept_positions(name, 5000)]
    assert typical_error(logits, golden[f"{name}/5000"]) < LARGEST_ERROR[weights]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_error_is_what_the_roundings_explain(name: str, weights: Weights) -> None:
    tokens = prompt(name, 300)
    checkpoint = tiny_checkpoint(name)
    expected = ReferenceModel(checkpoint).logits(tokens)
    rounded = (Bf16Reference if weights == "bf16" else Int8Reference)(checkpoint).logits(tokens)
    native = native_logits(name, weights, tokens)
    assert typical_error(native, rounded) < UNEXPLAINED[weights]
    assert typical_error(native, expected) < 1.2 * typical_error(rounded, expected)
    # Near ties between experts are decided by the same roundings, but for a few.
    all_native, all_rounded = (np.sqrt(np.mean(row_errors(x, expected) ** 2)) for x in (native, rounded))
    assert all_native < 1.5 * all_rounded


@pytest.mark.parametrize("name", CONFIGS)
def test_error_of_an_int8_cache_is_what_its_rounding_explains(name: str) -> None:
    tokens, checkpoint = prompt(name, 300), tiny_checkpoint(name)
    expected = ReferenceModel(checkpoint).logits(tokens)
    rounded = Int8CacheReference(checkpoint).logits(tokens)
    runner = NativeRunner(checkpoint, "bf16", 100, kv_cache="int8")
    native = Driver(runner, 12, seed=1).run(tokens, 100)
    assert typical_error(native, expected) < LARGEST_INT8_CACHE_ERROR
    assert typical_error(native, rounded) < UNEXPLAINED["int8"]
    assert typical_error(native, expected) < 1.2 * typical_error(rounded, expected)
    # It is no bf16 cache in disguise.
    assert not np.array_equal(native, native_logits(name, "bf16", tokens))


def test_int8_cache_is_the_same_one_token_at_a_time_and_on_two_threads() -> None:
    tokens = prompt("wide", 150)

    def logits(chunk: int, threads: int) -> Logits:
        configure(current_isa(), threads)
        return Driver(NativeRunner(tiny_checkpoint("wide"), "bf16", chunk, kv_cache="int8")).run(
            tokens, chunk
        )

    whole = logits(150, 1)
    assert typical_error(logits(1, 1), whole) < SAME["int8"]
    np.testing.assert_array_equal(logits(150, 2), whole)


@pytest.mark.parametrize("kv_cache", ["bf16", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_block_has_the_planned_bytes_and_comes_back(name: str, kv_cache: KvCache) -> None:
    runner = NativeRunner(tiny_checkpoint(name), "bf16", 64, kv_cache=kv_cache)
    driver = Driver(runner, 3)
    driver.run(prompt(name, 64), 64)
    for kind in CONFIGS[name].layer_kinds:
        kept = runner.read_block(kind, 1)
        assert len(kept) == block_bytes(CONFIGS[name], kind, kv_cache) and any(kept)
        assert runner.write_block(kind, 2, kept) and runner.read_block(kind, 2) == kept
        assert not runner.write_block(kind, 2, kept[1:]) and runner.read_block(kind, 2) == kept
        runner.copy_block(kind, 0, 2)
        assert runner.read_block(kind, 2) == runner.read_block(kind, 0) != kept


@pytest.mark.parametrize(
    ("layout", "experts"), [("huggingface", "mxfp4"), ("original", "mxfp4"), ("huggingface", "bf16")]
)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_layout_agrees_with_the_reference(
    layout: Any, experts: Any, weights: Weights, tmp_path: Path
) -> None:
    tokens = prompt("narrow", 129)
    expected = ReferenceModel(tiny_checkpoint("narrow")).logits(tokens)
    runner = NativeRunner(open_checkpoint(tiny_folder(tmp_path, "narrow", layout, experts)), weights)
    assert typical_error(Driver(runner).run(tokens, 129), expected) < LARGEST_ERROR[weights]
    runner.close()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_instruction_set_gives_the_same_logits(name: str, weights: Weights) -> None:
    tokens = prompt(name, 129)
    logits = {}
    for isa in supported_isa():
        configure(isa, 1)
        logits[isa] = native_logits(name, weights, tokens)
    for isa in supported_isa():
        assert typical_error(logits[isa], logits["scalar"]) < SAME[weights]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_two_threads_give_the_bits_of_one(name: str, weights: Weights) -> None:
    tokens = prompt(name, 129)
    configure(current_isa(), 1)
    one = native_logits(name, weights, tokens, 100)
    configure(current_isa(), 2)
    np.testing.assert_array_equal(native_logits(name, weights, tokens, 100), one)


@pytest.mark.parametrize("chunk", [1, 31, 32, 100])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_prompt_in_chunks_gives_the_logits_of_the_whole(weights: Weights, chunk: int) -> None:
    tokens = prompt("middle", 129)
    whole = native_logits("middle", weights, tokens)
    assert typical_error(native_logits("middle", weights, tokens, chunk), whole) < SAME[weights]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_batched_sequences_give_the_logits_of_each_alone(weights: Weights) -> None:
    # A prefill, a continued prefill and a decoded token share the second step.
    prompts = {name: prompt("tall", length) for name, length in (("a", 70), ("b", 41), ("c", 9))}
    alone = {name: native_logits("tall", weights, tokens) for name, tokens in prompts.items()}
    driver = Driver(runner_for("tall", weights), seed=2)
    first = driver.feed({"a": prompts["a"][:33], "b": prompts["b"][:40]})
    second = driver.feed({"c": prompts["c"], "b": prompts["b"][40:], "a": prompts["a"][33:]})
    for name, expected in alone.items():
        together = np.concatenate([step[name] for step in (first, second) if name in step])
        assert typical_error(together, expected) < SAME[weights]


@pytest.mark.parametrize("name", ["narrow", "wide"])
def test_order_of_blocks_changes_no_bit(name: str) -> None:
    tokens = prompt(name, 300)
    in_order = Driver(runner_for(name, "bf16"), seed=None).run(tokens, 90)
    shuffled = Driver(runner_for(name, "bf16"), seed=3).run(tokens, 90)
    np.testing.assert_array_equal(shuffled, in_order)


@pytest.mark.parametrize("name", ["narrow", "middle", "wide"])
def test_blocks_that_left_the_window_are_not_read(name: str) -> None:
    # The driver fills freed blocks with NaN and hands them out again.
    tokens = prompt(name, 300)
    kept, freed = Driver(runner_for(name, "bf16")), Driver(runner_for(name, "bf16"), num_blocks=12)
    for start in range(0, 300, 25):
        piece = {"": tokens[start : start + 25]}
        np.testing.assert_array_equal(freed.feed(piece)[""], kept.feed(piece, free_window=False)[""])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["narrow", "middle"])
def test_reused_prefix_gives_the_logits_of_a_computed_one(name: str, weights: Weights) -> None:
    tokens = prompt(name, 129)
    other = np.concatenate([tokens[:96], prompt(name, 50)])
    driver = Driver(runner_for(name, weights), seed=4)
    driver.feed({"first": tokens}, free_window=False)
    driver.fork("second", "first", 96)
    reused = driver.feed({"second": other[96:]}, free_window=False)["second"]
    assert typical_error(reused, native_logits(name, weights, other)[96:]) < SAME[weights]


@pytest.mark.parametrize("rows", [[0], [39], [3, 17, 38], [38, 3], list(range(39, -1, -1))])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_rows_that_are_asked_for_are_those_of_the_whole_step(weights: Weights, rows: list[int]) -> None:
    tokens = prompt("narrow", 40)
    whole = native_logits("narrow", weights, tokens)
    result = Driver(runner_for("narrow", weights)).step({"": tokens}, rows=rows, wants_logits=True)
    assert result.logits_RV is not None
    assert typical_error(result.logits_RV, whole[rows]) < SAME[weights] / 4
    assert result.tokens == (None,) * len(rows)


def test_step_without_rows_only_fills_the_cache() -> None:
    tokens = prompt("narrow", 40)
    whole = native_logits("narrow", "bf16", tokens)
    driver = Driver(runner_for("narrow", "bf16"))
    assert driver.step({"": tokens[:39]}, rows=[]).tokens == ()
    assert typical_error(driver.feed({"": tokens[39:]})[""], whole[39:]) < SAME["bf16"]


def test_greedy_tokens_are_the_best_logits_even_with_more_rows_than_scratch_holds() -> None:
    tokens = prompt("tall", 40)
    greedy = tuple(RowSampling(SamplingParams(temperature=0.0), key=5) for _ in tokens)
    driver = Driver(runner_for("tall", "int8"))
    sampled = driver.step({"": tokens}, sampling=greedy).tokens
    best = native_logits("tall", "int8", tokens).argmax(axis=1)
    assert [token.token_id for token in sampled if token is not None] == list(best)


def test_decoding_far_past_the_prompt_follows_the_reference() -> None:
    tokens = prompt("narrow", 100)
    expected = ReferenceModel(tiny_checkpoint("narrow")).logits(tokens)
    driver = Driver(runner_for("narrow", "bf16"))
    driver.feed({"": tokens[:10]})
    decoded = np.concatenate([driver.feed({"": tokens[i : i + 1]})[""] for i in range(10, 100)])
    assert typical_error(decoded, expected[10:]) < LARGEST_ERROR["bf16"]


@pytest.mark.parametrize("kinds", [("full",) * 6, ("window",) * 6])
def test_model_with_one_kind_of_layer_agrees_with_the_reference(kinds: Any) -> None:
    checkpoint = tiny_checkpoint("narrow", layer_kinds=kinds)
    tokens = prompt("narrow", 129)
    logits = Driver(NativeRunner(checkpoint, "bf16")).run(tokens, 50)
    assert typical_error(logits, ReferenceModel(checkpoint).logits(tokens)) < LARGEST_ERROR["bf16"]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_plan_counts_the_bytes_that_the_runner_takes(name: str, weights: Weights) -> None:
    runner = runner_for(name, weights, 100)
    assert runner.dense_bytes == dense_bytes(CONFIGS[name], weights)
    assert runner.scratch_bytes == step_scratch_bytes(CONFIGS[name], 100)


def test_progress_rises_to_the_whole() -> None:
    calls: list[tuple[int, int]] = []
    NativeRunner(tiny_checkpoint("tall"), progress=lambda done, total: calls.append((done, total)))
    totals = {total for _, total in calls}
    assert len(totals) == 1 and len(calls) == CONFIGS["tall"].num_layers + 1
    done = [done for done, _ in calls]
    assert done == sorted(done) and done[-1] == totals.pop()


def test_runner_satisfies_the_seam_and_ends_when_closed() -> None:
    runner: Runner = runner_for("narrow", "int8")
    driver = Driver(runner)
    driver.feed({"": prompt("narrow", 7)})
    runner.close()
    runner.close()
    with pytest.raises(EngineClosed):
        driver.feed({"again": prompt("narrow", 7)})


@pytest.mark.parametrize(("changes", "message"), [({"head_size": 20}, "20"), ({"num_heads": 15}, "240")])
def test_sizes_that_the_kernels_cannot_take_are_refused(changes: dict[str, Any], message: str) -> None:
    checkpoint = tiny_checkpoint("narrow")
    checkpoint.config = replace(checkpoint.config, **changes)
    with pytest.raises(CheckpointError, match=message):
        NativeRunner(checkpoint)
