"""The PyTorch runner through the Runner seam: chunks, blocks, windows, the other runners' tokens."""

from typing import Any

import numpy as np
import pytest

from harmonium.errors import EngineClosed
from harmonium.kernels.runtime import configure, current_isa, current_threads
from harmonium.model.batch import RowSampling, SamplingParams
from harmonium.model.native import NativeRunner
from harmonium.model.reference import ReferenceModel
from harmonium.model.runner import Runner
from tests.model.driver import Driver
from tests.model.tiny_models import CONFIGS, prompt, tiny_checkpoint
from tests.model.torch_extra import torch

from harmonium.model.torch import TorchModel  # isort: skip
from harmonium.model.torch_runner import TorchRunner  # isort: skip

GREEDY = RowSampling(SamplingParams(temperature=0.0), key=0)


def _runner(name: str, max_batch_tokens: int = 512) -> Runner:
    return TorchRunner(TorchModel.from_checkpoint(tiny_checkpoint(name)), max_batch_tokens)


@pytest.mark.parametrize("chunk", [129, 32, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_give_the_references_logits(name: str, chunk: int) -> None:
    tokens = prompt(name, 129)
    expected_TV = ReferenceModel(tiny_checkpoint(name)).logits(tokens)
    logits_TV = Driver(_runner(name), 8, seed=1).run(tokens, chunk)
    np.testing.assert_allclose(logits_TV, expected_TV, rtol=0, atol=1e-4)


def test_sequences_that_share_steps_do_not_mix() -> None:
    driver, parts = (
        Driver(_runner("narrow"), 32, seed=2),
        {"a": prompt("narrow", 40), "b": prompt("narrow", 77)},
    )
    first = driver.feed({name: tokens[:33] for name, tokens in parts.items()})
    second = driver.feed({"b": parts["b"][33:], "a": parts["a"][33:]})
    for name, tokens in parts.items():
        expected_TV = ReferenceModel(tiny_checkpoint("narrow")).logits(tokens)
        together_TV = np.concatenate([first[name], second[name]])
        np.testing.assert_allclose(together_TV, expected_TV, rtol=0, atol=1e-4)


def _greedy(runner: Runner, tokens: Any, count: int) -> list[int]:
    driver, answer, fed = Driver(runner, 16), [], tokens
    for _ in range(count):
        result = driver.step({"": fed}, rows=[len(fed) - 1], sampling=(GREEDY,))
        assert result.tokens[0] is not None and result.logits_RV is None
        answer.append(result.tokens[0].token_id)
        fed = np.array(answer[-1:], np.int32)
    return answer


def test_greedy_tokens_are_the_references_and_the_native_runners_but_for_near_ties() -> None:
    tokens, checkpoint = prompt("tall", 20), tiny_checkpoint("tall")
    answer = _greedy(_runner("tall"), tokens, 8)
    logits_TV = ReferenceModel(checkpoint).logits(np.concatenate([tokens, np.array(answer, np.int32)]))
    assert logits_TV[19:-1].argmax(axis=1).tolist() == answer
    # The native runner rounds activations to bf16, so it may take a token whose logit is nearly the best.
    isa, threads = current_isa(), current_threads()
    configure(isa, 1)
    native = _greedy(NativeRunner(checkpoint, "bf16"), tokens, 8)
    configure(isa, threads)
    same = next((place for place in range(8) if native[place] != answer[place]), 8)
    if same < 8:
        row_V = logits_TV[19 + same]
        assert row_V.max() - row_V[native[same]] < 0.1 * row_V.std()


def test_a_closed_runner_says_so() -> None:
    driver = Driver(_runner("narrow"), 4)
    driver.runner.close()
    driver.runner.close()
    with pytest.raises(EngineClosed):
        driver.step({"": prompt("narrow", 3)})


def test_bf16_cache_has_the_models_dtype() -> None:
    runner = TorchRunner(TorchModel.from_checkpoint(tiny_checkpoint("narrow"), torch.bfloat16))
    runner.allocate_cache(4, 4)
    assert {cache.dtype for pair in runner._caches for cache in pair} == {torch.bfloat16}
