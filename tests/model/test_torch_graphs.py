"""Recorded decoding steps, with a recording that any machine has; test_torch_cuda.py has CUDA's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from harmonium.model.batch import Batch
from tests.model.driver import Driver
from tests.model.tiny_models import prompt, tiny_checkpoint
from tests.model.torch_extra import torch
from tests.model.triton_extra import triton

from harmonium.model import torch_graphs, torch_triton_experts  # isort: skip
from harmonium.model.torch import TorchModel  # isort: skip
from harmonium.model.torch_graphs import StepGraphs, recorded_blocks  # isort: skip
from harmonium.model.torch_runner import TorchRunner  # isort: skip
from harmonium.model.torch_step import LastingInputs, StepInputs  # isort: skip

assert triton is not None


class _Recording:
    """As a CUDA graph does it: the function runs over the same memory, its result lies where it lay."""

    made: list[_Recording]

    def __init__(self, beside: _Recording | None) -> None:
        assert (beside is None) is (not self.made), "memory is shared"
        self.made.append(self)
        self.replays = 0

    def record(self, function: Callable[[], Any]) -> Any:
        self._function, self._out = function, function()
        return self._out

    def replay(self) -> None:
        self.replays += 1
        self._out.copy_(self._function())


class _Broken(_Recording):
    def record(self, function: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")


class _Wrong(_Recording):
    def replay(self) -> None:
        self._out.copy_(self._function() * 2)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[_Recording]:
    found: list[_Recording] = []
    monkeypatch.setattr(_Recording, "made", found, raising=False)
    # Fewer programs of the same code, as the interpreter takes its time for each.
    monkeypatch.setattr(torch_triton_experts, "VECTOR_OUTPUTS", 128)
    monkeypatch.setattr(torch_graphs, "LEAST_BLOCKS", 2)
    return found


def _driver(recording: Any) -> Driver:
    checkpoint = tiny_checkpoint("narrow", num_layers=2, layer_kinds=("window", "full"))
    model = TorchModel.from_checkpoint(checkpoint).requires_grad_(False)
    runner = TorchRunner(model, attention="triton", triton_experts=True, recording=recording)
    return Driver(runner, 24, seed=3)


def _decode(driver: Driver) -> np.ndarray[Any, Any]:
    """Two sequences that decode, over the end of a recording's blocks; then one of them alone."""
    tokens = {"a": prompt("narrow", 62), "b": prompt("narrow", 5)}
    pieces = [driver.feed({name: part[:-1] for name, part in tokens.items()})["b"]]
    for names in ["ab"] * 5 + ["b"] * 3:
        pieces += driver.feed({name: tokens[name][-1:] for name in names}).values()
    return np.concatenate(pieces)


def test_recorded_steps_give_the_logits_of_the_others(made: list[_Recording]) -> None:
    """Sequences that grow, lose window blocks and end; nothing of an earlier step is left in a recording."""
    expected = _decode(_driver(None))
    found = _decode(_driver(_Recording))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    # Two sequences in 2 blocks, the same in 4, one in 2: each is recorded, and run, when it comes again.
    assert [recording.replays for recording in made] == [2, 1, 2]


def _inputs(number: int, count: int = 1) -> StepInputs:
    return StepInputs(
        torch.full((count,), number), torch.zeros(count, 8), torch.ones(count, 8), torch.arange(count), {}, {}
    )


def _graphs(recording: Any) -> StepGraphs:
    """Of a model whose logits are its token's number."""

    def compute(inputs: StepInputs) -> Any:
        return (inputs.token_id_T[:, None] * inputs.sin_TK2).bfloat16()

    return StepGraphs(compute, torch.device("cpu"), recording)


@pytest.mark.parametrize(
    ("recording", "reason"), [(_Broken, "operation not permitted"), (_Wrong, "was off by 1 of the largest")]
)
def test_a_recording_that_fails_is_given_up_and_said(
    recording: Any, reason: str, made: list[_Recording], caplog: pytest.LogCaptureFixture
) -> None:
    graphs = _graphs(recording)
    with caplog.at_level(logging.WARNING, logger="harmonium.engine"):
        found = [float(graphs.logits(8, _inputs(number))[0, 0]) for number in range(1, 6)]
    assert found == [1, 2, 3, 4, 5]
    assert len(made) == 1, "it is not tried again"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("decoding goes on without CUDA graphs: ") and reason in line


def test_logits_that_are_nan_do_not_end_the_recordings(made: list[_Recording]) -> None:
    graphs = _graphs(_Recording)
    for number in (1, 2, 3):
        inputs = _inputs(number)
        inputs.sin_TK2.fill_(float("nan"))
        assert graphs.logits(8, inputs).isnan().all()
    assert graphs.logits(8, _inputs(4)).unique().tolist() == [4] and len(made) == 1


def test_the_recording_that_was_not_used_for_longest_goes(
    made: list[_Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_graphs, "MAX_RECORDINGS", 2)
    graphs = _graphs(_Recording)
    for count in (1, 1, 2, 2, 1, 3, 3, 1, 2, 2):
        graphs.logits(8, _inputs(7, count))
    assert [recording.replays for recording in made] == [3, 1, 1, 1]


def _batch(lengths: list[int], news: list[int], rows: list[int]) -> Batch:
    count, width = sum(news), max(-(-length // 32) for length in lengths)
    table = np.zeros((len(lengths), width), np.int32)
    return Batch(
        token_id_T=np.zeros(count, np.int32),
        position_T=np.concatenate([np.arange(n - m, n) for n, m in zip(lengths, news, strict=True)]),
        query_start_S1=np.concatenate([[0], np.cumsum(news)]).astype(np.int32),
        context_length_S=np.array(lengths, np.int32),
        full_block_SB=table,
        window_block_SB=table,
        logit_row_R=np.array(rows, np.int32),
        sampling=(None,) * len(rows),
    )


def test_steps_that_decode_are_recorded_by_their_blocks() -> None:
    assert recorded_blocks(_batch([5], [1], [0])) == torch_graphs.LEAST_BLOCKS == 8
    assert recorded_blocks(_batch([256, 3], [1, 1], [0, 1])) == 8
    assert recorded_blocks(_batch([257, 3], [1, 1], [0, 1])) == 16
    assert recorded_blocks(_batch([5], [2], [1])) == 0, "a prompt"
    assert recorded_blocks(_batch([5], [3], [0, 1, 2])) == 8, "two guesses are checked"
    assert recorded_blocks(_batch([5, 5], [3, 1], [0, 1, 2, 3])) == 0, "guesses beside another sequence"
    assert recorded_blocks(_batch([40], [10], list(range(10)))) == 0
    assert recorded_blocks(_batch([5, 5], [1, 1], [1])) == 0, "not all rows get logits"
    many = torch_graphs.MAX_RECORDED_TOKENS + 1
    assert recorded_blocks(_batch([5] * many, [1] * many, list(range(many)))) == 0


def test_all_inputs_of_a_step_travel_in_one_piece() -> None:
    driver = _driver(None)
    taken: list[Any] = []
    runner: Any = driver.runner
    compute = runner._compute
    runner._compute = lambda inputs, batch=None: taken.append(inputs) or compute(inputs, batch)
    driver.feed({"a": prompt("narrow", 1), "b": prompt("narrow", 1)})
    places = LastingInputs(taken[0], torch.device("cpu"))
    pointers: list[int] = []
    places.inputs.map(lambda name, tensor: pointers.append(tensor.data_ptr()) or tensor)
    assert len(set(pointers)) == len(pointers) == 10
    assert max(pointers) - min(pointers) < 4096 and not any(pointer % 16 for pointer in pointers)
    driver.feed({"a": prompt("narrow", 1), "b": prompt("narrow", 1)})
    places.fill(taken[1])
    sent: dict[str, Any] = {}
    places.inputs.map(lambda name, tensor: sent.setdefault(name, tensor))
    taken[1].map(lambda name, tensor: torch.testing.assert_close(sent[name], tensor))
