"""The names of the three layouts, against the table in docs/architecture.md and against each other."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

import pytest

from harmonium.checkpoint.names import (
    ExpertFormat,
    canonical_tensors,
    find_expert_format,
    highest_layer,
    stored_name,
    tensor_sources,
)
from harmonium.errors import CheckpointError
from harmonium.testing import tiny_config

TINY = tiny_config(vocabulary_size=300)
ARCHITECTURE = Path(__file__).parents[2] / "docs" / "architecture.md"


def test_the_table_in_the_architecture_page_names_every_tensor() -> None:
    page = ARCHITECTURE.read_text(encoding="utf-8")
    section = page.split("## Names of tensors")[1].split("\n## ")[0]
    first_column = " ".join(line.split("|")[1] for line in section.splitlines() if line.startswith("|"))
    # A name that begins with a dot replaces the end of the last whole name: ".v.*", ".bias".
    named: set[str] = set()
    whole = ""
    for name in re.findall(r"`([^`]+)`", first_column):
        if name.startswith(".down."):
            full = f"layers.{{i}}.experts{name}"
        elif name.startswith("."):
            parts = name[1:].split(".")
            full = ".".join([*whole.split(".")[: -len(parts)], *parts])
        else:
            full = whole = name
        named |= {f"{full[:-1]}weight", f"{full[:-1]}bias"} if full.endswith("*") else {full}
    for experts in ("mxfp4", "bf16"):
        for name, _, _ in canonical_tensors(TINY, experts):
            general = re.sub(r"^layers\.\d+\.", "layers.{i}.", name)
            assert general in named, f"docs/architecture.md lacks {name}"


def test_every_number_of_the_original_layout_is_used_once() -> None:
    stored: dict[str, int] = {}
    used: dict[str, int] = {}
    for source in tensor_sources(TINY, "original", "mxfp4"):
        stored[source.stored] = prod(source.stored_shape)
        used[source.stored] = used.get(source.stored, 0) + prod(source.shape)
    assert used == stored


def test_q_k_and_v_follow_each_other_in_the_fused_rows() -> None:
    rows = {
        source.name: (source.first_row, source.first_row + source.shape[0])
        for source in tensor_sources(TINY, "original", "mxfp4")
        if source.name.startswith("layers.0.attention.") and source.stored.endswith("attn.qkv.weight")
    }
    assert [rows[f"layers.0.attention.{part}.weight"] for part in "qkv"] == [(0, 192), (192, 256), (256, 320)]


@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
def test_huggingface_names_are_all_different(experts: ExpertFormat) -> None:
    names = [stored_name(name, "huggingface") for name, _, _ in canonical_tensors(TINY, experts)]
    assert len(set(names)) == len(names)


def test_two_formats_of_experts_are_refused() -> None:
    names = ["model.layers.0.mlp.experts.gate_up_proj_blocks", "model.layers.1.mlp.experts.gate_up_proj"]
    with pytest.raises(CheckpointError, match="two formats"):
        find_expert_format(names, "huggingface", "m")


def test_no_experts_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"expected tensors such as block\.0\.mlp\.mlp1_weight\.blocks"):
        find_expert_format(["norm.scale"], "original", "m")


def test_plain_experts_of_the_original_layout_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'block\.0\.mlp\.mlp1_weight' is plain"):
        find_expert_format(["block.0.mlp.mlp1_weight"], "original", "m")


def test_layer_numbers_are_found_in_the_layout_they_belong_to() -> None:
    names = [
        "model.layers.3.a",
        "model.layers.12.b",
        "block.40.c",
        "model.layers.99999999999.d",
        "lm_head.weight",
    ]
    assert highest_layer(names, "huggingface") == 12
    assert highest_layer(names, "original") == 40
    assert highest_layer([], "original") == -1
