"""A Runner of three tiny layers (window, full, window) over integers, with a paged cache of its own.

The next token is a function of everything that a sequence can see, as read back from the fake cache through
the block tables of each step: a wrong table, a block freed too early, a block that two sequences write, or a
prefix resumed without its window changes the answer, and a read outside what was written raises.
`expected_answer` computes the same without a cache.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.lora import LoraAdapter
from harmonium.checkpoint.model_config import LayerKind, ModelConfig, RopeConfig
from harmonium.config import CACHE_BLOCK_TOKENS
from harmonium.model.batch import Batch, RowSampling, SampledToken, SamplingParams, StepResult

P = CACHE_BLOCK_TOKENS
VOCABULARY_SIZE = 97
GREEDY = SamplingParams(temperature=0)

Words = npt.NDArray[np.uint64]
Table = npt.NDArray[np.int32]


def fake_config(
    window: int = 40, layer_kinds: tuple[LayerKind, ...] = ("window", "full", "window")
) -> ModelConfig:
    """A shape with this window; the fake runner reads nothing else but the vocabulary's size."""
    return ModelConfig(
        num_layers=3,
        hidden_size=96,
        expert_size=64,
        num_heads=12,
        num_kv_heads=4,
        head_size=16,
        num_experts=5,
        num_active_experts=2,
        vocabulary_size=VOCABULARY_SIZE,
        window=window,
        max_context=4096,
        layer_kinds=layer_kinds,
        rope=RopeConfig(10000.0, 1.0, 32.0, 1.0, 4096, False),
        rms_norm_eps=1e-5,
        swiglu_limit=7.0,
    )


def _mix(words: Words) -> Words:
    """A hash of each word (the finalizer of SplitMix64)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = words ^ (words >> np.uint64(31))
    return mixed


def _attend(keys: Words, first: int, start: int, window: int) -> Words:
    """Per query position from start on: a hash of the keys it sees. keys: those of positions first, first +
    1..."""
    positions = np.arange(first, first + len(keys), dtype=np.uint64)
    sums = np.concatenate(
        [np.zeros(1, np.uint64), np.cumsum(keys * (_mix(positions) | np.uint64(1)), dtype=np.uint64)]
    )
    query = np.arange(start - first, len(keys))
    left = np.maximum(query - window + 1, 0) if window else np.zeros_like(query)
    return _mix(sums[query + 1] - sums[left])


def _first_keys(token_ids: npt.NDArray[np.int32], start: int, adapter: int) -> Words:
    """An adapter makes other keys of the same tokens."""
    positions = np.arange(start, start + len(token_ids), dtype=np.uint64)
    keys = token_ids.astype(np.uint64) * np.uint64(1_000_003) + positions
    return _mix(keys + np.uint64(1_000_000_007 * (adapter + 1)))


def _choose(hidden: int, row: RowSampling) -> int:
    """A token from the last hidden word and everything that the row's sampling carries."""
    params, value = row.params, hidden
    if params.temperature > 0:
        value += row.key
    if row.answer_token_ids is not None and row.answer_counts is not None:
        value += int((row.answer_token_ids.astype(np.int64) * row.answer_counts).sum())
    if row.prompt_token_ids is not None:
        value += int(row.prompt_token_ids.sum())
    return int(_mix(np.array([value % 2**64], np.uint64))[0] % np.uint64(VOCABULARY_SIZE))


class FakeRunner:
    """See the module. before_step is called with each batch; what it raises, the step raises."""

    def __init__(
        self,
        window: int = 40,
        max_batch_tokens: int = 512,
        before_step: Callable[[Batch], None] | None = None,
        seconds_per_step: float = 0.0,
    ) -> None:
        self.config = fake_config(window)
        self.max_batch_tokens = max_batch_tokens
        self.before_step = before_step
        self.seconds_per_step = seconds_per_step
        self.batches: list[Batch] = []
        self.is_closed = False
        self._in_step = threading.Lock()
        self.adapters: dict[int, LoraAdapter | None] = {}

    def allocate_cache(self, num_full_blocks: int, num_window_blocks: int) -> None:
        # A value is kept with its position and the token there: a stale block is told from a right one.
        self._full = np.zeros((num_full_blocks, P, 2), np.uint64)
        self._window = np.zeros((num_window_blocks, P, 3), np.uint64)
        self._full[..., 0] = self._window[..., 0] = 2**63  # a position that no query asks for

    def read_block(self, kind: LayerKind, block: int) -> bytes:
        return (self._full if kind == "full" else self._window)[block].tobytes()

    def write_block(self, kind: LayerKind, block: int, data: bytes) -> bool:
        cache = self._full if kind == "full" else self._window
        if len(data) != cache[block].nbytes:
            return False
        cache[block] = np.frombuffer(data, np.uint64).reshape(cache[block].shape)
        return True

    def copy_block(self, kind: LayerKind, source: int, target: int) -> None:
        cache = self._full if kind == "full" else self._window
        cache[target] = cache[source]

    def set_adapter(self, index: int, adapter: LoraAdapter | None) -> None:
        assert self._in_step.acquire(blocking=False), "an adapter is changed during a step"
        self.adapters[index] = adapter
        self._in_step.release()

    def step(self, batch: Batch) -> StepResult:
        assert self._in_step.acquire(blocking=False), "two steps at once"
        try:
            if self.seconds_per_step:
                time.sleep(self.seconds_per_step)
            self.batches.append(batch)
            if self.before_step is not None:
                self.before_step(batch)
            return self._step(batch)
        finally:
            self._in_step.release()

    def _step(self, batch: Batch) -> StepResult:
        assert not self.is_closed
        assert len(batch.token_id_T) == batch.query_start_S1[-1] <= self.max_batch_tokens
        self._check_writes(batch)
        hidden = np.zeros(len(batch.token_id_T), np.uint64)
        for s in range(len(batch.context_length_S)):
            rows = slice(int(batch.query_start_S1[s]), int(batch.query_start_S1[s + 1]))
            start = int(batch.context_length_S[s]) - (rows.stop - rows.start)
            assert (batch.position_T[rows] == np.arange(start, batch.context_length_S[s])).all()
            adapter = -1 if batch.adapter_S is None else int(batch.adapter_S[s])
            assert self.adapters.get(adapter, ...) is not None, "a step names an adapter that was dropped"
            tables = batch.full_block_SB[s], batch.window_block_SB[s]
            hidden[rows] = self._layers(batch.token_id_T[rows], start, *tables, adapter)
        assert len(batch.logit_row_R) == len(batch.sampling)
        tokens = tuple(
            None if row is None else SampledToken(_choose(int(hidden[i]), row), *_logprobs(row))
            for i, row in zip(batch.logit_row_R, batch.sampling, strict=True)
        )
        logits = None
        if batch.wants_logits:
            spread = (
                hidden[batch.logit_row_R][:, None] + np.arange(VOCABULARY_SIZE, dtype=np.uint64)
            ).astype(np.uint64)
            logits = (_mix(spread) >> np.uint64(40)).astype(np.float32)
        return StepResult(tokens, logits)

    def _check_writes(self, batch: Batch) -> None:
        """No two sequences of a step may write to one block."""
        for table in (batch.full_block_SB, batch.window_block_SB):
            written: list[int] = []
            for s, length in enumerate(batch.context_length_S):
                start = int(length) - int(batch.query_start_S1[s + 1] - batch.query_start_S1[s])
                written += table[s, start // P : -(-int(length) // P)].tolist()
            assert len(set(written)) == len(written) and min(written) >= 0

    def _layers(
        self, token_ids: npt.NDArray[np.int32], start: int, full: Table, windowed: Table, adapter: int
    ) -> Words:
        window, end = self.config.window, start + len(token_ids)
        first = max(0, start - window + 1)
        keys = _first_keys(token_ids, start, adapter)
        self._write(self._window, windowed, start, 1, keys)
        hidden = _attend(self._read(self._window, windowed, first, end, 1), first, start, window)
        self._write(self._full, full, start, 1, hidden)
        hidden = _attend(self._read(self._full, full, 0, end, 1), 0, start, 0)
        self._write(self._window, windowed, start, 2, hidden)
        return _attend(self._read(self._window, windowed, first, end, 2), first, start, window)

    def _write(self, cache: Words, table: Table, start: int, field: int, values: Words) -> None:
        positions = np.arange(start, start + len(values))
        blocks = table[positions // P]
        assert (blocks >= 0).all()
        cache[blocks, positions % P, 0] = positions
        cache[blocks, positions % P, field] = values

    def _read(self, cache: Words, table: Table, first: int, end: int, field: int) -> Words:
        positions = np.arange(first, end)
        blocks = table[positions // P]
        assert (blocks >= 0).all(), "the table says -1 for a position that the query sees"
        assert (cache[blocks, positions % P, 0] == positions).all(), "a block holds other positions"
        values: Words = cache[blocks, positions % P, field]
        return values

    def close(self) -> None:
        self.is_closed = True


def _logprobs(row: RowSampling) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    if row.params.logprobs is None:
        return None, ()
    return -0.5, tuple((i, -0.5 - i) for i in range(row.params.logprobs))


def last_hidden(token_ids: Sequence[int], window: int = 40, adapter: int = -1) -> Words:
    """What the fake model computes at each position, without any cache."""
    keys = _first_keys(np.array(token_ids, np.int32), 0, adapter)
    hidden = _attend(keys, 0, 0, window)
    hidden = _attend(hidden, 0, 0, 0)
    return _attend(hidden, 0, 0, window)


def expected_answer(
    prompt: Sequence[int],
    num_tokens: int,
    window: int = 40,
    sampling: Callable[[list[int]], RowSampling] | None = None,
    adapter: int = -1,
) -> list[int]:
    """The answer of num_tokens tokens; sampling gives the row's settings after the tokens so far (None:
    greedy)."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        row = sampling(tokens) if sampling is not None else RowSampling(GREEDY, 0)
        tokens.append(_choose(int(last_hidden(tokens, window, adapter)[-1]), row))
    return tokens[len(prompt) :]
