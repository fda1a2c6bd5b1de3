"""Transformers' GptOss in float32, eager attention, holding exactly a checkpoint's dequantized weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.model.reference import ReferenceModel, TensorSource
from harmonium.model.rope import inverse_frequencies


def transformers_model(checkpoint: TensorSource, *, our_frequencies: bool = False) -> Any:
    """Needs torch and transformers.

    our_frequencies: replace the rotary frequencies by ours. PyTorch's float32 power misses the nearest
    float32 in 2 of the 32 frequencies of head size 64 (ours are the nearest), which is 6e-5 radians at
    position 5,000: see docs/numerics.md.
    """
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    config = checkpoint.config
    rope = config.rope
    make: Any = GptOssForCausalLM._from_config
    oracle = make(
        GptOssConfig(
            num_hidden_layers=config.num_layers,
            num_local_experts=config.num_experts,
            vocab_size=config.vocabulary_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.expert_size,
            head_dim=config.head_size,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            sliding_window=config.window,
            num_experts_per_tok=config.num_active_experts,
            layer_types=[
                "sliding_attention" if kind == "window" else "full_attention" for kind in config.layer_kinds
            ],
            max_position_embeddings=config.max_context,
            rms_norm_eps=config.rms_norm_eps,
            swiglu_limit=config.swiglu_limit,
            rope_parameters=_rope_parameters(rope),
            tie_word_embeddings=False,
        ),
        attn_implementation="eager",
        dtype=torch.float32,
    )
    assert oracle.config._attn_implementation == "eager"
    state = {name: torch.from_numpy(array) for name, array in _state(checkpoint).items()}
    oracle.load_state_dict(state, strict=True)
    if our_frequencies:
        oracle.model.rotary_emb.inv_freq.copy_(torch.from_numpy(inverse_frequencies(rope, config.head_size)))
    return oracle.eval()


def transformers_logits(oracle: Any, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        output = oracle(torch.from_numpy(token_ids.astype(np.int64))[None], use_cache=False)
    return np.asarray(output.logits[0].numpy())


def _rope_parameters(rope: Any) -> dict[str, Any]:
    if rope.factor <= 1.0:
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {
        "rope_type": "yarn",
        "rope_theta": rope.theta,
        "factor": rope.factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "truncate": rope.truncate,
        "original_max_position_embeddings": rope.original_context,
    }


def _state(checkpoint: TensorSource) -> dict[str, npt.NDArray[np.float32]]:
    reader = ReferenceModel(checkpoint)

    def read(name: str) -> npt.NDArray[np.float32]:
        return np.ascontiguousarray(reader.bf16(checkpoint.tensor(name)))

    state = {
        "model.embed_tokens.weight": read("embedding.weight"),
        "model.norm.weight": read("norm.weight"),
        "lm_head.weight": read("unembedding.weight"),
    }
    for i in range(checkpoint.config.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        state[theirs + "input_layernorm.weight"] = read(ours + "attention_norm.weight")
        state[theirs + "post_attention_layernorm.weight"] = read(ours + "mlp_norm.weight")
        state[theirs + "self_attn.sinks"] = read(ours + "attention.sinks")
        for kind in ("weight", "bias"):
            for part, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj")):
                state[f"{theirs}self_attn.{name}.{kind}"] = read(f"{ours}attention.{part}.{kind}")
            state[f"{theirs}mlp.router.{kind}"] = read(f"{ours}router.{kind}")
        for part, name in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
            # Transformers keeps experts as [E, inputs, outputs].
            matrices = [
                reader.expert_weight(f"{ours}experts.{part}", expert).T
                for expert in range(checkpoint.config.num_experts)
            ]
            state[f"{theirs}mlp.experts.{name}"] = np.ascontiguousarray(np.stack(matrices))
            state[f"{theirs}mlp.experts.{name}_bias"] = read(f"{ours}experts.{part}.bias")
    return state
