"""NativeRunner: a step of the model over the native kernels, with a paged key/value cache.

The arithmetic is that of reference.py, in the same order; what differs is told in docs/numerics.md.
Everything a step needs lies in memory taken before the first one: a step allocates only what it returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.checkpoint import Checkpoint
from harmonium.checkpoint.lora import LoraAdapter
from harmonium.checkpoint.model_config import LayerKind, ModelConfig
from harmonium.checkpoint.names import EMBEDDING
from harmonium.config import CACHE_BLOCK_TOKENS, KvCache, Weights
from harmonium.errors import CheckpointError, EngineClosed
from harmonium.kernels.ops import attention, rms_norm, rope_and_store, router
from harmonium.model.batch import Batch, SampledToken, StepResult
from harmonium.model.cache import LayerCache, copy_block, read_block, take_cache, write_block
from harmonium.model.expert_cache import ExpertCounts
from harmonium.model.lora import AdapterSet, StepAdapters
from harmonium.model.memory import EMBEDDING_ROWS_KEPT, MAX_LOGIT_ROWS
from harmonium.model.pages import Reader, take
from harmonium.model.rope import attention_factor, inverse_frequencies, rope_tables
from harmonium.model.sampler import sample_rows
from harmonium.model.step_program import MAX_RECORDED_TOKENS, StepPlaces, StepPrograms
from harmonium.model.streamed_experts import ExpertStream, StreamedExperts
from harmonium.model.weights import (
    Experts,
    FloatArray,
    LayerWeights,
    MappedSource,
    ModelWeights,
    Progress,
    load_weights,
)


@dataclass(slots=True)
class _Scratch:
    """Rows for the tokens of a step. hidden and normed trade places in the last layer."""

    hidden_TD: FloatArray
    normed_TD: FloatArray
    qkv_TN: FloatArray
    mixed_TN: FloatArray
    expert_id_TA: npt.NDArray[np.int32]
    expert_weight_TA: FloatArray
    logits_RV: FloatArray


class NativeRunner:
    """Runs a checkpoint on the CPU. Implements model.runner.Runner.

    weights: "int8" converts the dense weights at load and quantizes activations; "bf16" uses them as they are
    and rounds activations to bf16. progress: called with (bytes done, bytes in all). adapters: those that
    sequences of a batch may name by their places here. packs_experts: copy MXFP4 experts in the background in
    the order of the products (int8 weights only; the same numbers, faster). num_expert_slots: keep only so
    many MXFP4 experts in memory and read others when they are needed (of a Checkpoint's files); 0: all are
    used where they lie. kv_cache: how keys and values are held. The checkpoint is closed with the runner. The
    kernels' threads and instruction set are the process's (kernels.runtime.configure).

    Raises CheckpointError for sizes that the kernels cannot take.
    """

    def __init__(
        self,
        checkpoint: MappedSource,
        weights: Weights = "int8",
        max_batch_tokens: int = 512,
        progress: Progress | None = None,
        adapters: Sequence[LoraAdapter] = (),
        packs_experts: bool = False,
        num_expert_slots: int = 0,
        kv_cache: KvCache = "bf16",
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config = checkpoint.config
        _check_sizes(config)
        self._max_batch_tokens = max_batch_tokens
        self._stream: ExpertStream | None = None
        if num_expert_slots:
            assert isinstance(checkpoint, Checkpoint) and not packs_experts
            self._stream = ExpertStream(checkpoint, weights, num_expert_slots, max_batch_tokens)
        self._weights: ModelWeights | None = load_weights(checkpoint, weights, progress, self._stream)
        packers: list[Callable[[threading.Event], None]] = [
            layer.experts.pack
            for layer in self._weights.layers
            if packs_experts and not isinstance(layer.experts, StreamedExperts)
        ]
        if self._stream is not None:
            packers.append(partial(take, self._stream.cache.pool))
        self._reader = Reader(self._weights.mapped(packs_experts), self._weights.embedding_VD, packers)
        self._frequencies = inverse_frequencies(config.rope, config.head_size)
        self._attention_factor = attention_factor(config.rope)
        self._scratch: _Scratch | None = _take_scratch(config, max_batch_tokens)
        self._kv_cache: KvCache = kv_cache
        self._caches: list[LayerCache] = []
        self._embedding_rows = 0
        self._adapters = AdapterSet(adapters, config, max_batch_tokens)
        self._programs = StepPrograms()

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def max_batch_tokens(self) -> int:
        return self._max_batch_tokens

    @property
    def dense_bytes(self) -> int:
        """What the plan calls dense_bytes, as it was taken; 0 when closed."""
        return 0 if self._weights is None else self._weights.dense_bytes

    @property
    def adapter_bytes(self) -> int:
        """Memory that adapters hold, their scratch included; 0 when closed."""
        return self._adapters.nbytes

    @property
    def scratch_bytes(self) -> int:
        """Memory for a step beside what the kernels keep; 0 when closed."""
        scratch, stream = self._scratch, self._stream
        if scratch is None:
            return 0
        own: int = sum(getattr(scratch, name).nbytes for name in scratch.__slots__)
        return own + (0 if stream is None else stream.scratch_bytes)

    @property
    def expert_counts(self) -> ExpertCounts | None:
        """What streaming experts came to so far; None where they are not streamed."""
        return None if self._stream is None else replace(self._stream.cache.counts)

    def allocate_cache(self, num_full_blocks: int, num_window_blocks: int) -> None:
        assert not self._caches, "the cache was allocated before"
        config = self._config
        num_blocks = {"full": num_full_blocks, "window": num_window_blocks}
        for kind in config.layer_kinds:
            self._caches.append(take_cache(config, num_blocks[kind], self._kv_cache))

    def set_adapter(self, index: int, adapter: LoraAdapter | None) -> None:
        """See AdapterRunner."""
        self._adapters = self._adapters.changed(index, adapter)

    def step(self, batch: Batch) -> StepResult:
        """See Runner. Raises EngineClosed after `close`, EngineError when a row of logits holds NaN,
        CheckpointError when a file of the checkpoint was shortened meanwhile, or an expert cannot be read.
        """
        weights, scratch = self._weights, self._scratch
        if weights is None or scratch is None:
            raise EngineClosed("the runner has been closed")
        self._checkpoint.check_sizes()
        num_tokens = batch.token_id_T.size
        assert 0 < num_tokens <= self._max_batch_tokens, (
            f"{num_tokens} tokens; scratch is for {self._max_batch_tokens}"
        )
        assert len(self._caches) == self._config.num_layers, "allocate_cache comes before the first step"
        places, adapters = self._places(batch), self._adapters.in_step(batch)
        hidden_TD, normed_TD = scratch.hidden_TD[:num_tokens], scratch.normed_TD[:num_tokens]
        self._embed(weights, batch.token_id_T, hidden_TD)
        if adapters is None and self._is_repeated(batch):
            layers = partial(self._run_layers, weights, hidden_TD, normed_TD)
            self._programs.run(batch, places, self._weights_state(weights), layers)
            return self._finish(weights, batch, hidden_TD, normed_TD)
        last = self._config.num_layers - 1
        for index, layer in enumerate(weights.layers):
            mixed_TN = self._attend(layer, index, places, adapters, hidden_TD, normed_TD)
            if index == last and not _is_every_row(batch.logit_row_R, num_tokens):
                # Past the last attention only rows that get logits matter.
                hidden_TD, normed_TD, mixed_TN = self._keep_rows(
                    batch.logit_row_R, hidden_TD, normed_TD, mixed_TN
                )
                if not hidden_TD.size:
                    break
                adapters = adapters and adapters.keep(batch.logit_row_R)
            layer.out(mixed_TN, hidden_TD, True)
            if adapters is not None:
                adapters.add_out(index, mixed_TN, hidden_TD)
            self._mix_experts(layer, index, adapters, hidden_TD, normed_TD)
        return self._finish(weights, batch, hidden_TD, normed_TD)

    def _is_repeated(self, batch: Batch) -> bool:
        """Whether the step is one of the small ones that decode, whose calls are always the same."""
        num_tokens = batch.token_id_T.size
        return (
            self._stream is None
            and num_tokens <= MAX_RECORDED_TOKENS
            and _is_every_row(batch.logit_row_R, num_tokens)
        )

    def _weights_state(self, weights: ModelWeights) -> int:
        """Changes whenever a layer's experts have been packed."""
        return sum(isinstance(layer.experts, Experts) and layer.experts.is_packed for layer in weights.layers)

    def _run_layers(
        self, weights: ModelWeights, hidden_TD: FloatArray, normed_TD: FloatArray, places: StepPlaces
    ) -> None:
        for index, layer in enumerate(weights.layers):
            mixed_TN = self._attend(layer, index, places, None, hidden_TD, normed_TD)
            layer.out(mixed_TN, hidden_TD, True)
            self._mix_experts(layer, index, None, hidden_TD, normed_TD)

    def read_block(self, kind: LayerKind, block: int) -> bytes:
        """Keys and values of one cache block as they are held, layer by layer of that kind. Between two steps
        only.
        """
        return read_block(self._caches_of(kind), block)

    def write_block(self, kind: LayerKind, block: int, data: bytes) -> bool:
        """What `read_block` gave, back into a block; False, and no change, for another number of bytes."""
        return write_block(self._caches_of(kind), block, data)

    def copy_block(self, kind: LayerKind, source: int, target: int) -> None:
        """Keys and values of one cache block to another. Between two steps only."""
        copy_block(self._caches_of(kind), source, target)

    def _caches_of(self, kind: LayerKind) -> list[LayerCache]:
        layers = zip(self._config.layer_kinds, self._caches, strict=True)
        return [cache for layer_kind, cache in layers if layer_kind == kind]

    def wait_until_resident(self) -> None:
        """Return when the weights that are used where they lie in the files have been read once.

        Steps need not wait for it; measurements of speed and memory do.
        """
        self._reader.wait()

    def close(self) -> None:
        if self._weights is not None:
            self._reader.close()
            if self._stream is not None:
                self._stream.cache.close()
                self._stream = None
            self._programs.clear()
            self._weights = self._scratch = None
            self._adapters = AdapterSet((), self._config, 0)
            self._caches.clear()
            self._checkpoint.close()

    def _places(self, batch: Batch) -> StepPlaces:
        position_T = batch.position_T
        cos_TK2, sin_TK2 = rope_tables(position_T, self._frequencies, self._attention_factor)
        sequence_T = np.repeat(np.arange(batch.context_length_S.size), np.diff(batch.query_start_S1))
        index_T, offset_T = np.divmod(position_T, CACHE_BLOCK_TOKENS)
        block_SB: dict[LayerKind, npt.NDArray[np.int32]] = {
            "full": batch.full_block_SB,
            "window": batch.window_block_SB,
        }
        slot_T: dict[LayerKind, npt.NDArray[np.int64]] = {}
        for kind, table_SB in block_SB.items():
            if kind in self._config.layer_kinds:
                block_T = table_SB[sequence_T, index_T].astype(np.int64)
                assert block_T.min() >= 0, f"a token of the step has no {kind} block"
                slot_T[kind] = block_T * CACHE_BLOCK_TOKENS + offset_T
        return StepPlaces(cos_TK2, sin_TK2, slot_T, block_SB, batch.query_start_S1, batch.context_length_S)

    def _embed(self, weights: ModelWeights, token_id_T: npt.NDArray[np.int32], hidden_TD: FloatArray) -> None:
        for start in range(0, token_id_T.size, EMBEDDING_ROWS_KEPT):
            rows = slice(start, start + EMBEDDING_ROWS_KEPT)
            weights.embed(token_id_T[rows], hidden_TD[rows])
            self._embedding_rows += token_id_T[rows].size
            if self._embedding_rows >= EMBEDDING_ROWS_KEPT:
                # A fault maps up to 2 MB around a row; without this the whole table would end up resident.
                self._checkpoint.advise(EMBEDDING, "dontneed")
                self._embedding_rows = 0

    def _attend(
        self,
        layer: LayerWeights,
        index: int,
        places: StepPlaces,
        adapters: StepAdapters | None,
        hidden_TD: FloatArray,
        normed_TD: FloatArray,
    ) -> FloatArray:
        """The heads' mixed values, before the output projection; keys and values go to the cache."""
        config, scratch = self._config, self._scratch
        assert scratch is not None
        qkv_TN, mixed_TN = scratch.qkv_TN[: len(hidden_TD)], scratch.mixed_TN[: len(hidden_TD)]
        cache = self._caches[index]
        rms_norm(hidden_TD, layer.attention_norm_D, config.rms_norm_eps, normed_TD)
        layer.qkv(normed_TD, qkv_TN)
        if adapters is not None:
            adapters.add_qkv(index, normed_TD, qkv_TN)
        rope_and_store(
            qkv_TN,
            places.cos_TK2,
            places.sin_TK2,
            cache.key,
            cache.value,
            places.slot_T[layer.kind],
            config.num_heads,
            cache.key_scale,
            cache.value_scale,
        )
        attention(
            qkv_TN,
            cache.key,
            cache.value,
            places.block_SB[layer.kind],
            places.query_start_S1,
            places.context_length_S,
            layer.sink_H,
            config.window if layer.kind == "window" else 0,
            config.head_size**-0.5,
            mixed_TN,
            cache.key_scale,
            cache.value_scale,
        )
        return mixed_TN

    def _mix_experts(
        self,
        layer: LayerWeights,
        index: int,
        adapters: StepAdapters | None,
        hidden_TD: FloatArray,
        normed_TD: FloatArray,
    ) -> None:
        scratch = self._scratch
        assert scratch is not None
        expert_id_TA = scratch.expert_id_TA[: len(hidden_TD)]
        expert_weight_TA = scratch.expert_weight_TA[: len(hidden_TD)]
        rms_norm(hidden_TD, layer.mlp_norm_D, self._config.rms_norm_eps, normed_TD)
        routes = expert_id_TA, expert_weight_TA
        if adapters is None:
            router(normed_TD, layer.router_weight_ED, layer.router_bias_E, *routes)
            layer.experts(normed_TD, *routes, hidden_TD)
            return
        extra_TE = adapters.router_extra(index, normed_TD)
        router(normed_TD, layer.router_weight_ED, layer.router_bias_E, *routes, extra_TE)
        listed = adapters.experts(index)
        layer.experts(normed_TD, *routes, hidden_TD, listed, None if listed is None else adapters.adapter_T)

    def _keep_rows(
        self, row_R: npt.NDArray[np.int32], hidden_TD: FloatArray, normed_TD: FloatArray, mixed_TN: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(hidden, normed, mixed) of these rows alone, in memory that the last layer needs no more."""
        scratch, num_rows = self._scratch, row_R.size
        assert scratch is not None
        width = mixed_TN.shape[1]
        mixed_RN = scratch.qkv_TN.reshape(-1)[: num_rows * width].reshape(num_rows, width)
        # mode="clip" spares NumPy a buffered copy; the rows are in range.
        np.take(mixed_TN, row_R, axis=0, out=mixed_RN, mode="clip")
        np.take(hidden_TD, row_R, axis=0, out=normed_TD[:num_rows], mode="clip")
        return normed_TD[:num_rows], hidden_TD[:num_rows], mixed_RN

    def _finish(
        self, weights: ModelWeights, batch: Batch, hidden_RD: FloatArray, normed_RD: FloatArray
    ) -> StepResult:
        """Logits and tokens of the rows in hidden_RD: those of logit_row_R, in its order."""
        num_rows = batch.logit_row_R.size
        if num_rows == len(hidden_RD) and num_rows:
            rms_norm(hidden_RD, weights.norm_D, self._config.rms_norm_eps, normed_RD)
        if batch.wants_logits:
            logits_RV = np.empty((num_rows, self._config.vocabulary_size), np.float32)
            if num_rows:
                weights.unembedding(normed_RD, logits_RV)
            return StepResult(sample_rows(logits_RV, batch.sampling), logits_RV)
        scratch = self._scratch
        assert scratch is not None
        tokens: list[SampledToken | None] = []
        for start in range(0, num_rows, len(scratch.logits_RV)):
            rows = slice(start, min(start + len(scratch.logits_RV), num_rows))
            logits_RV = scratch.logits_RV[: rows.stop - rows.start]
            weights.unembedding.sampled_logits(normed_RD[rows], batch.sampling[rows], logits_RV)
            tokens += sample_rows(logits_RV, batch.sampling[rows])
        return StepResult(tuple(tokens))


def _check_sizes(config: ModelConfig) -> None:
    """What the kernels ask for beyond what a checkpoint may be."""
    if config.head_size % 8:
        raise CheckpointError(f"head_dim is {config.head_size}; the kernels take multiples of 8")
    width = config.num_heads * config.head_size
    if width % 32:
        raise CheckpointError(
            f"num_attention_heads * head_dim is {width}; the kernels take multiples of 32 (a scale's inputs)"
        )


def _is_every_row(row_R: npt.NDArray[np.int32], num_tokens: int) -> bool:
    assert row_R.size <= num_tokens, f"{row_R.size} rows of logits for {num_tokens} tokens"
    return row_R.size == num_tokens and bool((np.diff(row_R) == 1).all()) and row_R[0] == 0


def _take_scratch(config: ModelConfig, max_batch_tokens: int) -> _Scratch:
    T, A, HK = max_batch_tokens, config.num_active_experts, config.num_heads * config.head_size

    def rows(width: int) -> FloatArray:
        return np.zeros((T, width), np.float32)

    return _Scratch(
        hidden_TD=rows(config.hidden_size),
        normed_TD=rows(config.hidden_size),
        qkv_TN=rows(HK + 2 * config.num_kv_heads * config.head_size),
        mixed_TN=rows(HK),
        expert_id_TA=np.zeros((T, A), np.int32),
        expert_weight_TA=rows(A),
        logits_RV=np.zeros((min(MAX_LOGIT_ROWS, T), config.vocabulary_size), np.float32),
    )
