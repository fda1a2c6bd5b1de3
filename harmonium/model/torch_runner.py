"""TorchRunner: a step of the model in PyTorch over a paged key/value cache, for `--engine torch`.

The same modules as in training, so that what was trained can be served and compared without an export. What
computes attention is model.attention's choice: most implementations take a sequence's keys gathered from
their blocks in each layer of a step; the Triton kernel reads the blocks where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmonium.checkpoint.checkpoint import Checkpoint
from harmonium.checkpoint.model_config import LayerKind, ModelConfig
from harmonium.config import CACHE_BLOCK_TOKENS
from harmonium.errors import EngineClosed
from harmonium.model.attention import AttentionChoice
from harmonium.model.batch import Batch, StepResult
from harmonium.model.sampler import sample_rows
from harmonium.model.torch import TorchModel
from harmonium.model.torch_backends import GATHERED
from harmonium.model.torch_device import torch_device
from harmonium.model.torch_fused import FusedLayers
from harmonium.model.torch_graphs import CudaRecording, Recording, StepGraphs, recorded_blocks
from harmonium.model.torch_step import StepInputs, block_table, ids, slots

_TRITON = "harmonium.model.torch_triton"
"""Of the modules with our Triton kernels."""


class TorchRunner:
    """Runs a TorchModel. Implements model.runner.Runner.

    The cache has the model's dtype and device. checkpoint: closed with the runner, where one is given.
    attention: one of model.attention's names, which must run on the model's device. triton_experts: multiply
    MXFP4 experts with our Triton kernels. recording: makes recordings of decoding steps (model.torch_graphs),
    which takes Triton for both; None: nothing is recorded.
    """

    def __init__(
        self,
        model: TorchModel,
        max_batch_tokens: int = 512,
        checkpoint: Checkpoint | None = None,
        attention: str = "eager",
        triton_experts: bool = False,
        recording: Callable[[Any], Recording] | None = None,
    ) -> None:
        self._model: TorchModel | None = model
        self._config = model.config
        self._max_batch_tokens = max_batch_tokens
        self._checkpoint = checkpoint
        # Triton is an extra, so its modules are imported where they are asked for.
        self._paged: Any = import_module(f"{_TRITON}_attention") if attention == "triton" else None
        self._mix = GATHERED.get(attention)
        assert (self._mix is None) is (self._paged is not None), attention
        self._experts: Any = None
        self._fused: FusedLayers | None = None
        if triton_experts and model.experts == "mxfp4":
            self._experts = import_module(f"{_TRITON}_experts").triton_experts
            if self._paged is not None:
                self._fused = FusedLayers(model)
        self._caches: list[tuple[Tensor, Tensor]] = []
        self._graphs: StepGraphs | None = None
        if recording is not None:
            assert self._fused is not None, "others wait for the device"
            self._graphs = StepGraphs(self._compute, model.lm_head.weight.device, recording)

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def max_batch_tokens(self) -> int:
        return self._max_batch_tokens

    def allocate_cache(self, num_full_blocks: int, num_window_blocks: int) -> None:
        """See Runner. Raises MemoryError where a card has not as much."""
        assert self._model is not None and not self._caches, "the cache was allocated before"
        config, like = self._config, self._model.lm_head.weight
        num_blocks = {"full": num_full_blocks, "window": num_window_blocks}
        for kind in config.layer_kinds:
            shape = (num_blocks[kind], CACHE_BLOCK_TOKENS, config.num_kv_heads, config.head_size)
            with _memory_errors():
                self._caches.append((like.new_zeros(shape), like.new_zeros(shape)))

    @torch.inference_mode()
    def step(self, batch: Batch) -> StepResult:
        """See Runner. Raises EngineClosed after `close`, EngineError when a row of logits holds NaN."""
        if self._model is None:
            raise EngineClosed("the runner has been closed")
        assert batch.token_id_T.size <= self._max_batch_tokens, f"{batch.token_id_T.size} tokens"
        num_blocks = recorded_blocks(batch) if self._graphs is not None else 0
        inputs = self._inputs(self._model, batch, num_blocks)
        if num_blocks:
            assert self._graphs is not None
            logits = self._graphs.logits(num_blocks, inputs)
        else:
            logits = self._compute(inputs.to(self._model.lm_head.weight.device), batch).float().cpu()
        logits_RV = np.ascontiguousarray(logits.numpy())
        tokens = sample_rows(logits_RV, batch.sampling)
        return StepResult(tokens, logits_RV.copy() if batch.wants_logits else None)

    def _inputs(self, model: TorchModel, batch: Batch, num_blocks: int) -> StepInputs:
        """On the host. num_blocks: of a sequence, that attention is cut for; 0: as many as there are."""
        kinds = tuple(dict.fromkeys(self._config.layer_kinds))
        return StepInputs(
            ids(batch.token_id_T),
            *model.host_angles(batch.position_T),
            ids(batch.logit_row_R),
            {kind: slots(batch, kind) for kind in kinds},
            {kind: self._tiles(batch, kind, num_blocks) for kind in kinds if self._paged is not None},
        )

    def _compute(self, inputs: StepInputs, batch: Batch | None = None) -> Tensor:
        """Logits [R, V] in the model's dtype. batch: for attention that takes gathered keys."""
        model = self._model
        assert model is not None
        if self._fused is not None:
            return self._fused.compute(inputs, self._caches)
        hidden_TD: Tensor = model.model.embed_tokens(inputs.token_id_T)
        for index, layer in enumerate(model.model.layers):
            attention: Any = layer.self_attn
            query, key, value = attention.project(
                layer.input_layernorm(hidden_TD),  # type: ignore[operator]
                inputs.cos_TK2,
                inputs.sin_TK2,
            )
            self._store(index, inputs.slots, key, value)
            if self._paged is not None:
                mixed_THK = self._attend_paged(index, inputs.tiles, attention.sinks, query)
            else:
                assert batch is not None
                mixed_THK = self._attend(index, batch, attention.sinks, query)
            hidden_TD = hidden_TD + attention.o_proj(mixed_THK.flatten(1))
            hidden_TD = hidden_TD + self._feed_forward(layer.mlp, layer.post_attention_layernorm(hidden_TD))  # type: ignore[operator]
        logits_RV: Tensor = model.lm_head(model.model.norm(hidden_TD.index_select(0, inputs.row_R)))
        return logits_RV

    def close(self) -> None:
        self._model = self._fused = None
        self._caches.clear()
        if self._graphs is not None:
            self._graphs.close()
        if self._checkpoint is not None:
            self._checkpoint.close()

    def _store(
        self, index: int, slots: Mapping[LayerKind, Tensor], key_TGK: Tensor, value_TGK: Tensor
    ) -> None:
        slot_T = slots[self._config.layer_kinds[index]]
        for cache, new in zip(self._caches[index], (key_TGK, value_TGK), strict=True):
            cache.flatten(0, 1).index_copy_(0, slot_T, new)

    def _tiles(self, batch: Batch, kind: LayerKind, num_blocks: int) -> Any:
        """How the step's queries are cut in the layers of a kind, on the host."""
        config = self._config
        return self._paged.lay_out(
            batch.position_T,
            batch.query_start_S1,
            block_table(batch, kind, num_blocks),
            config.window if kind == "window" else 0,
            config.num_heads,
            config.num_kv_heads,
            torch.device("cpu"),
            num_blocks * CACHE_BLOCK_TOKENS,
        )

    def _attend_paged(
        self, index: int, tiles: Mapping[LayerKind, Any], sink_H: Tensor, query_THK: Tensor
    ) -> Tensor:
        kind, scale = self._config.layer_kinds[index], self._config.head_size**-0.5
        mixed: Tensor = self._paged.paged_attention(
            query_THK, *self._caches[index], sink_H, tiles[kind], scale
        )
        return mixed

    def _feed_forward(self, mlp: Any, x_TD: Tensor) -> Tensor:
        out: Tensor
        if self._experts is None:
            out, _ = mlp(x_TD)
        else:
            _, expert_id_TA, weight_TA = mlp.router(x_TD)
            out = self._experts(mlp.experts, x_TD, expert_id_TA, weight_TA)
        return out

    def _attend(self, index: int, batch: Batch, sink_H: Tensor, query_THK: Tensor) -> Tensor:
        """Each sequence against its own blocks, those before the window left out: [T, H, K]."""
        kind = self._config.layer_kinds[index]
        table_SB, device = block_table(batch, kind), query_THK.device
        window, scale = self._config.window if kind == "window" else 0, self._config.head_size**-0.5
        assert self._mix is not None
        answers = []
        for s, context in enumerate(batch.context_length_S.tolist()):
            rows = slice(int(batch.query_start_S1[s]), int(batch.query_start_S1[s + 1]))
            first_seen = max(0, int(batch.position_T[rows.start]) - window + 1) if window else 0
            first_block = first_seen // CACHE_BLOCK_TOKENS
            block_B = table_SB[s, first_block : -(-context // CACHE_BLOCK_TOKENS)]
            assert block_B.min() >= 0, "a token of the context has no block"
            blocks, offset = ids(block_B).to(device), first_block * CACHE_BLOCK_TOKENS
            # The tail of the last block is not there yet.
            key, value = (
                cache.index_select(0, blocks).flatten(0, 1)[: context - offset]
                for cache in self._caches[index]
            )
            answers.append(self._mix(query_THK[rows], key, value, sink_H, window, scale))
        return torch.cat(answers)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """A card's lack of memory is Python's MemoryError, as the machine's is."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error


def load_torch_runner(
    checkpoint: Checkpoint, max_batch_tokens: int, threads: int, attention: AttentionChoice
) -> TorchRunner:
    """A checkpoint on the chosen device; MXFP4 experts stay in its map on a CPU. Sets PyTorch's threads.

    Raises MemoryError where a card has less memory than that.
    """
    torch.set_num_threads(threads)
    model = TorchModel.from_checkpoint(checkpoint, getattr(torch, attention.dtype)).requires_grad_(False)
    with _memory_errors():
        model = model.to(torch_device(attention.device))
    has_kernels = attention.name == "triton" and attention.has_triton_experts and model.experts == "mxfp4"
    return TorchRunner(
        model,
        max_batch_tokens,
        checkpoint,
        attention.name,
        attention.has_triton_experts,
        CudaRecording if has_kernels and attention.device.kind == "cuda" else None,
    )
