"""gpt-oss in PyTorch, from top to bottom: for training, and for `--engine torch`. Needs `harmonium[torch]`.

Modules and parameters are named as in Transformers' GptOssForCausalLM, so a state dict of float experts is a
Hugging Face state dict, and adapters in PEFT's format fit by name. There is no batch axis: samples lie one
after the other in T rows, and attention never crosses from one to the next.

    model = TorchModel.from_checkpoint("gpt-oss-20b", torch.bfloat16)      # experts stay MXFP4, mapped
    logits_RV = model(token_id_T, starts=(0, 117), rows=torch.tensor([116, 300]))

Dimension letters: docs/architecture.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from harmonium.checkpoint import open_checkpoint
from harmonium.checkpoint.model_config import LayerKind, ModelConfig
from harmonium.checkpoint.names import canonical_tensors, stored_name
from harmonium.errors import ConfigError
from harmonium.model.reference import TensorSource
from harmonium.model.rope import attention_factor, inverse_frequencies, rope_tables
from harmonium.model.torch_attention import sink_attention
from harmonium.model.torch_experts import PARTS, Experts, Router
from harmonium.model.torch_mxfp4 import dequantize

ExpertStorage = Literal["mxfp4", "float"]
"""mxfp4: frozen, as the files hold them. float: parameters that can be trained."""

INITIAL_DEVIATION = 0.02
"""Of weights at the start of training. Source: gpt-oss's config.json, initializer_range."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the rows are: their angles, and the first and last row that each sees in a kind of layer."""

    cos_TK2: Tensor
    sin_TK2: Tensor
    first_T: dict[LayerKind, Tensor]
    last_T: Tensor


class RmsNorm(nn.Module):
    """Computed in float32, returned in the input's dtype."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size, dtype=dtype))

    def forward(self, x_TD: Tensor) -> Tensor:
        x = x_TD.float()
        root = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return (self.weight.float() * (x * root)).to(x_TD.dtype)


class Attention(nn.Module):
    """Grouped queries, a sink a head; `kind` says how far back a token sees."""

    def __init__(self, config: ModelConfig, kind: LayerKind, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.head_size = kind, config.head_size
        D, HK = config.hidden_size, config.num_heads * config.head_size
        GK = config.num_kv_heads * config.head_size
        self.q_proj = nn.Linear(D, HK, dtype=dtype)
        self.k_proj = nn.Linear(D, GK, dtype=dtype)
        self.v_proj = nn.Linear(D, GK, dtype=dtype)
        self.o_proj = nn.Linear(HK, D, dtype=dtype)
        self.sinks = nn.Parameter(torch.zeros(config.num_heads, dtype=dtype))

    def project(self, x_TD: Tensor, cos_TK2: Tensor, sin_TK2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(query [T, H, K], key [T, G, K], value [T, G, K]), the first two rotated."""
        query, key, value = (
            projection(x_TD).unflatten(-1, (-1, self.head_size))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(query, cos_TK2, sin_TK2), rotate(key, cos_TK2, sin_TK2), value

    def mix(self, query: Tensor, key: Tensor, value: Tensor, first_T: Tensor, last_T: Tensor) -> Tensor:
        """[T, D]: each query's view of the keys from first to last, through the output projection."""
        mixed_THK = sink_attention(query, key, value, self.sinks, first_T, last_T, self.head_size**-0.5)
        out: Tensor = self.o_proj(mixed_THK.flatten(1))
        return out

    def forward(self, x_TD: Tensor, places: Places) -> Tensor:
        query, key, value = self.project(x_TD, places.cos_TK2, places.sin_TK2)
        return self.mix(query, key, value, places.first_T[self.kind], places.last_T)


class Mlp(nn.Module):
    """The router and its experts."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, packed: bool) -> None:
        super().__init__()
        self.router = Router(config, dtype)
        self.experts = Experts(config, dtype, packed)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(the experts' answer [T, D], the router's scores [T, E])."""
        score_TE, expert_id_TA, weight_TA = self.router(x_TD)
        return self.experts(x_TD, expert_id_TA, weight_TA), score_TE


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, kind: LayerKind, dtype: torch.dtype, packed: bool) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config, dtype)
        self.self_attn = Attention(config, kind, dtype)
        self.post_attention_layernorm = RmsNorm(config, dtype)
        self.mlp = Mlp(config, dtype, packed)

    def forward(self, hidden_TD: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """(hidden states after the layer, its router's scores [T, E])."""
        hidden_TD = hidden_TD + self.self_attn(self.input_layernorm(hidden_TD), places)
        mixed_TD, score_TE = self.mlp(self.post_attention_layernorm(hidden_TD))
        return hidden_TD + mixed_TD, score_TE


class Decoder(nn.Module):
    """Everything but the output matrix; Transformers calls it `model`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, packed: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(Layer(config, kind, dtype, packed) for kind in config.layer_kinds)
        self.norm = RmsNorm(config, dtype)


class TorchModel(nn.Module):
    """A gpt-oss model. Use `from_checkpoint` or `from_config`.

    config: its sizes. experts: how the experts are held. recomputes: keep only each layer's input for the
    backward pass and compute the layer again there (gradient checkpointing).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, experts: ExpertStorage) -> None:
        super().__init__()
        self.config = config
        self.experts: ExpertStorage = experts
        self.recomputes = False
        self.model = Decoder(config, dtype, experts == "mxfp4")
        self.lm_head = nn.Linear(config.hidden_size, config.vocabulary_size, bias=False, dtype=dtype)
        self._frequencies = inverse_frequencies(config.rope, config.head_size)

    @classmethod
    def from_config(cls, config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> TorchModel:
        """A model with float experts and random weights, the same for the same seed.

        Weights have deviation 0.02, those that write to the hidden states less by the root of twice the
        layers (as in GPT-2), biases and sinks are 0, norms 1.
        """
        with torch.device("meta"):
            model = cls(config, dtype, "float")
        model.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        last = INITIAL_DEVIATION * (2 * config.num_layers) ** -0.5
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("bias", "sinks")):
                    parameter.zero_()
                elif "norm" in name:
                    parameter.fill_(1)
                else:
                    deviation = last if "o_proj" in name or "down_proj" in name else INITIAL_DEVIATION
                    parameter.normal_(0, deviation, generator=generator)
        return model

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path | TensorSource,
        dtype: torch.dtype = torch.float32,
        experts: ExpertStorage | None = None,
    ) -> TorchModel:
        """A checkpoint's model on the CPU.

        experts: None takes "mxfp4" where the files have it, else "float". MXFP4 experts stay in the map,
        which lives as long as the model; everything else is copied.

        Raises ConfigError for "mxfp4" where the files hold bf16 experts, and what `open_checkpoint` raises.
        """
        if isinstance(source, (str, Path)):
            with open_checkpoint(source) as opened:
                return cls.from_checkpoint(opened, dtype, experts)
        stored = "float" if source.expert_format == "bf16" else "mxfp4"
        if experts == "mxfp4" and stored == "float":
            raise ConfigError("experts is 'mxfp4', and this checkpoint's experts are bf16; expected 'float'")
        with torch.device("meta"):
            model = cls(source.config, dtype, experts or stored)  # type: ignore[arg-type]
        state = {name: tensor.contiguous() for name, tensor in _state(source, dtype, model.experts)}
        model.load_state_dict(state, strict=True, assign=True)
        return model

    def forward(self, token_id_T: Tensor, starts: Sequence[int] = (0,), rows: Tensor | None = None) -> Tensor:
        """Logits [R, V] after the tokens in `rows` (None: after each). starts: as in `hidden_states`."""
        hidden_TD, _ = self.hidden_states(token_id_T, starts)
        logits_RV: Tensor = self.lm_head(hidden_TD if rows is None else hidden_TD.index_select(0, rows))
        return logits_RV

    def hidden_states(
        self, token_id_T: Tensor, starts: Sequence[int] = (0,)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(what the output matrix takes [T, D], each layer's router scores [T, E]).

        token_id_T: int64. starts: the row where each sample begins, ascending, the first 0; its positions
        count from there, and its tokens see no other sample's.
        """
        places = self.places(starts, len(token_id_T))
        hidden_TD: Tensor = self.model.embed_tokens(token_id_T)
        scores = []
        for layer in self.model.layers:
            if self.recomputes and torch.is_grad_enabled():
                hidden_TD, score_TE = recompute_in_backward(
                    layer, hidden_TD, places, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden_TD, score_TE = layer(hidden_TD, places)
            scores.append(score_TE)
        return self.model.norm(hidden_TD), tuple(scores)

    def places(self, starts: Sequence[int], num_tokens: int) -> Places:
        """Where packed samples are. Raises ConfigError for starts that are not ascending from 0."""
        start_S = np.asarray(starts, np.int64)
        if not start_S.size or start_S[0] != 0 or (np.diff(start_S, append=num_tokens) <= 0).any():
            shown = ", ".join(map(str, starts[:8]))
            raise ConfigError(f"samples start at rows {shown}; expected 0, ascending, below {num_tokens}")
        row_T = np.arange(num_tokens)
        start_T = np.repeat(start_S, np.diff(start_S, append=num_tokens))
        cos_TK2, sin_TK2 = self.angles((row_T - start_T).astype(np.int32))
        first_T: dict[LayerKind, npt.NDArray[np.int64]] = {
            "full": start_T,
            "window": np.maximum(start_T, row_T - self.config.window + 1),
        }
        device = self.lm_head.weight.device
        return Places(
            cos_TK2,
            sin_TK2,
            {kind: torch.from_numpy(first).to(device) for kind, first in first_T.items()},
            torch.from_numpy(row_T).to(device),
        )

    def angles(self, position_T: npt.NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        """(cos, sin) [T, K/2], float32 on the model's device."""
        cos_TK2, sin_TK2 = self.host_angles(position_T)
        device = self.lm_head.weight.device
        return cos_TK2.to(device), sin_TK2.to(device)

    def host_angles(self, position_T: npt.NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        """(cos, sin) [T, K/2], float32 on the CPU."""
        cos, sin = rope_tables(position_T, self._frequencies, attention_factor(self.config.rope))
        return torch.from_numpy(cos), torch.from_numpy(sin)


def rotate(x: Tensor, cos_TK2: Tensor, sin_TK2: Tensor) -> Tensor:
    """Turns the halves of each head, in float32: [T, heads, K] -> the same in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos_TK2[:, None], sin_TK2[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _state(source: TensorSource, dtype: torch.dtype, experts: ExpertStorage) -> Iterator[tuple[str, Tensor]]:
    """The state dict's entries, under Hugging Face's names, whatever the layout of the files."""
    packed = source.expert_format != "bf16"
    for name, kind, _ in canonical_tensors(source.config, "mxfp4" if packed else "bf16"):
        stored = stored_name(name, "huggingface")
        tensor = _as_tensor(source.tensor(name))
        if kind == "BF16":
            yield stored, tensor.view(torch.bfloat16).to(dtype, copy=True)
            advise = getattr(source, "advise", None)
            if advise is not None:
                advise(name, "dontneed")  # copied: the map's pages need not stay
        elif experts == "mxfp4":
            yield stored, tensor
        elif name.endswith(".blocks"):
            scales = _as_tensor(source.tensor(name.removesuffix("blocks") + "scales"))
            matrices = [dequantize(*pair, dtype).T for pair in zip(tensor, scales, strict=True)]
            yield stored.removesuffix("_blocks"), torch.stack(matrices)


def _as_tensor(array: npt.NDArray[Any]) -> Tensor:
    """The same memory: bf16 bits as int16. Nobody writes to it, which is what PyTorch's warning is about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)


def expert_parts(model: TorchModel) -> Iterator[tuple[str, Experts]]:
    """(name of the parameter such as "model.layers.0.mlp.experts.down_proj", the experts that hold it)."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            for part in PARTS:
                yield f"{name}.{part}", module
