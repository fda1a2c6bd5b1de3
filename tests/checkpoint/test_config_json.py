"""config.json of both spellings: what is read, and that nothing which decides the arithmetic is guessed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harmonium.checkpoint.config_json import read_config
from harmonium.checkpoint.model_config import ModelConfig, RopeConfig
from harmonium.errors import CheckpointError
from harmonium.testing import huggingface_config, original_config, tiny_config

TINY = tiny_config(vocabulary_size=300)

RELEASED_20B_ORIGINAL: dict[str, object] = {
    "num_hidden_layers": 24,
    "num_experts": 32,
    "experts_per_token": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "swiglu_limit": 7.0,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}


def read(folder: Path, table: object) -> ModelConfig:
    path = folder / "config.json"
    path.write_text(json.dumps(table))
    return read_config(path).model


def huggingface(**changes: object) -> dict[str, Any]:
    return {**huggingface_config(TINY, "mxfp4", "rope_scaling", tied=False), **changes}


def without(table: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name not in names}


def quantized(method: str) -> dict[str, Any]:
    return huggingface(quantization_config={"quant_method": method})


def rope(**changes: object) -> dict[str, Any]:
    table = huggingface()
    table["rope_scaling"] = {**table["rope_scaling"], **changes}
    return table


def test_the_released_20b_reads_as_it_is_described(tmp_path: Path) -> None:
    config = read(tmp_path, RELEASED_20B_ORIGINAL)
    assert (config.num_layers, config.num_experts, config.num_active_experts) == (24, 32, 4)
    assert (config.num_heads, config.num_kv_heads, config.head_size, config.group_size) == (64, 8, 64, 8)
    assert config.rope == RopeConfig(150_000.0, 32.0, 32.0, 1.0, original_context=4096, truncate=False)
    assert (config.max_context, config.window, config.rms_norm_eps) == (131_072, 128, 1e-5)
    assert config.layer_kinds[:3] == ("window", "full", "window")


def test_all_spellings_give_one_config(tmp_path: Path) -> None:
    new = huggingface_config(TINY, "bf16", "rope_parameters", tied=False)
    assert "rope_theta" not in new
    tables: list[dict[str, Any]] = [huggingface(), new, original_config(TINY)]
    tables.append({**without(huggingface(), "num_experts_per_tok"), "experts_per_token": 2})
    tables.append({**without(huggingface(), "num_local_experts"), "num_experts": 5})
    tables.append(without(huggingface(), "layer_types"))
    tables.append(huggingface(layer_types=None, a_new_field={"x": 1}))
    tables.append(without(original_config(TINY), "swiglu_limit"))
    for table in tables:
        assert read(tmp_path, table) == TINY


def test_the_older_key_type_names_the_rope_type(tmp_path: Path) -> None:
    table = huggingface()
    table["rope_scaling"]["type"] = table["rope_scaling"].pop("rope_type")
    assert read(tmp_path, table) == TINY


def test_plain_rope_has_factor_one(tmp_path: Path) -> None:
    config = read(tmp_path, huggingface(rope_scaling={"rope_type": "default"}))
    assert (config.rope.factor, config.rope.theta) == (1.0, 150_000.0)


def test_absent_yarn_fields_are_those_of_transformers(tmp_path: Path) -> None:
    table = huggingface(initial_context_length=2048)
    table["rope_scaling"] = {"rope_type": "yarn", "factor": 8.0}
    assert read(tmp_path, table).rope == RopeConfig(150_000.0, 8.0, 32.0, 1.0, 2048, truncate=True)


def test_a_model_of_full_layers_needs_no_window(tmp_path: Path) -> None:
    config = read(tmp_path, huggingface(layer_types=["full_attention"] * 6, sliding_window=None))
    assert set(config.layer_kinds) == {"full"}


def test_an_attention_factor_that_follows_from_the_factor_is_fine(tmp_path: Path) -> None:
    assert read(tmp_path, rope(attention_factor=1.3465735902799727)) == TINY


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "another model": (lambda: huggingface(model_type="llama"), "model_type is 'llama'.*'gpt_oss'"),
    "no model_type": (lambda: without(huggingface(), "model_type"), "model_type is None"),
    "bitsandbytes": (
        lambda: huggingface(quantization_config={"quant_method": "bitsandbytes"}),
        "'bitsandbytes'",
    ),
    "gptq": (lambda: huggingface(quantization_config={"quant_method": "gptq"}), "quant_method is 'gptq'"),
    "awq": (lambda: huggingface(quantization_config={"quant_method": "awq"}), "quant_method is 'awq'"),
    "fp8": (lambda: huggingface(quantization_config={"quant_method": "fp8"}), "quant_method is 'fp8'"),
    "quantization without a method": (lambda: huggingface(quantization_config={}), "quant_method is None"),
    "quantization not an object": (lambda: huggingface(quantization_config="mxfp4"), "expected an object"),
    "hidden_act": (lambda: huggingface(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "attention without bias": (lambda: huggingface(attention_bias=False), "attention_bias is False"),
    "zero layers": (lambda: huggingface(num_hidden_layers=0), "num_hidden_layers is 0; expected .* from 1"),
    "negative width": (lambda: huggingface(hidden_size=-96), "hidden_size is -96"),
    "width not in blocks": (
        lambda: huggingface(hidden_size=100),
        "hidden_size is 100; .* multiple of 32",
    ),
    "expert width not in blocks": (lambda: huggingface(intermediate_size=65), "intermediate_size is 65"),
    "odd head": (lambda: huggingface(head_dim=15), "head_dim is 15; expected an even"),
    "heads not divisible": (
        lambda: huggingface(num_key_value_heads=5),
        r"of num_key_value_heads \(5\)",
    ),
    "more active than experts": (lambda: huggingface(num_experts_per_tok=6), "6 experts are active .* has 5"),
    "spellings disagree": (lambda: huggingface(experts_per_token=3), "is 2 and experts_per_token is 3"),
    "float for int": (
        lambda: huggingface(hidden_size=96.0),
        r"is 96\.0; expected a whole number",
    ),
    "string for int": (lambda: huggingface(vocab_size="300"), "vocab_size is '300'"),
    "boolean for int": (lambda: huggingface(num_key_value_heads=True), "num_key_value_heads is True"),
    "null for int": (lambda: huggingface(vocab_size=None), "vocab_size is None"),
    "absent int": (lambda: without(huggingface(), "head_dim"), "head_dim is missing"),
    "absent experts": (lambda: without(huggingface(), "num_local_experts"), "num_local_experts is missing"),
    "vocabulary of 2**63": (lambda: huggingface(vocab_size=1 << 63), "vocab_size is 9223372036854775808"),
    "million layers": (lambda: huggingface(num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
    "no window": (lambda: huggingface(sliding_window=None), "sliding_window is None"),
    "zero epsilon": (lambda: huggingface(rms_norm_eps=0), "rms_norm_eps is 0"),
    "string epsilon": (lambda: huggingface(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5'"),
    "negative limit": (lambda: huggingface(swiglu_limit=-7.0), "swiglu_limit is -7"),
    "too few layer types": (lambda: huggingface(layer_types=["full_attention"]), "1 entries; expected 6"),
    "layer types not a list": (lambda: huggingface(layer_types="full"), "layer_types has 'full'"),
    "unknown layer type": (
        lambda: huggingface(layer_types=["chunked"] * 6),
        r"types\[0\] is 'chunked'",
    ),
    "tied not a flag": (lambda: huggingface(tie_word_embeddings="no"), "tie_word_embeddings is 'no'"),
    "rope absent": (lambda: without(huggingface(), "rope_scaling"), "rope_scaling is missing"),
    "rope null": (lambda: huggingface(rope_scaling=None), "rope_scaling is None"),
    "rope a list": (lambda: huggingface(rope_scaling=[]), r"rope_scaling is \[\]"),
    "rope type unknown": (lambda: rope(rope_type="longrope"), "rope_type is 'longrope'; expected 'yarn'"),
    "rope type a list": (lambda: rope(rope_type=["yarn"]), r"rope_type is \['yarn'\]"),
    "rope factor a string": (lambda: rope(factor="32"), "rope_scaling: factor is '32'"),
    "rope factor under one": (lambda: rope(factor=0.5), r"factor is 0\.5"),
    "rope beta a boolean": (lambda: rope(beta_fast=True), "beta_fast is True"),
    "rope betas reversed": (
        lambda: rope(beta_fast=1.0, beta_slow=32.0),
        "beta_fast is 1; expected more",
    ),
    "rope truncate a number": (lambda: rope(truncate=0), "truncate is 0; expected true or false"),
    "rope context a float": (lambda: rope(original_max_position_embeddings=4096.0), r"is 4096\.0"),
    "rope context absent": (
        lambda: rope(original_max_position_embeddings=None),
        "initial_context_length is m",
    ),
    "rope attention factor": (
        lambda: rope(attention_factor=1.0),
        r"is 1\.0; expected 1\.346574",
    ),
    "rope mscale": (lambda: rope(mscale=1.0), r"mscale is 1\.0; expected nothing"),
    "rope partial": (lambda: huggingface(partial_rotary_factor=0.5), r"partial_rotary_factor is 0\.5"),
    "rope theta absent": (lambda: without(huggingface(), "rope_theta"), "rope_theta is missing"),
    "rope theta a list": (lambda: huggingface(rope_theta=[1]), r"rope_theta is \[1\]"),
    "original without experts": (
        lambda: without(RELEASED_20B_ORIGINAL, "num_experts"),
        "experts is missing",
    ),
    "original with zero factor": (
        lambda: {**RELEASED_20B_ORIGINAL, "rope_scaling_factor": 0},
        "rope_scaling_factor is 0",
    ),
    "not an object": (lambda: ["gpt_oss"], "holds a JSON list"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_config_that_we_cannot_compute_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, make())
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


def test_an_infinite_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(huggingface()).replace("1e-05", "1e999"))
    with pytest.raises(CheckpointError, match="rms_norm_eps is inf"):
        read_config(path)


def test_no_mutated_config_raises_anything_else(tmp_path: Path) -> None:
    generator = random.Random(2)
    values = [
        None,
        True,
        0,
        -1,
        1.5,
        1e300,
        1 << 70,
        "",
        "x",
        [],
        [None],
        {},
        {"a": 1},
        64,
        32,
        "yarn",
        "default",
    ]
    num_read = 0
    for turn in range(900):
        table = [
            huggingface(),
            huggingface_config(TINY, "mxfp4", "rope_parameters", tied=True),
            original_config(TINY),
        ][turn % 3]
        for _ in range(generator.randint(1, 2)):
            inner = [value for value in table.values() if isinstance(value, dict)]
            target = generator.choice([table, *inner])
            if target:
                target[generator.choice(list(target))] = generator.choice(values)
        try:
            config = read(tmp_path, table)
        except CheckpointError:
            continue
        num_read += 1
        assert config.num_heads % config.num_kv_heads == 0
        assert len(config.layer_kinds) == config.num_layers
    assert 50 < num_read < 700
