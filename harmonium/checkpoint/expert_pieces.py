"""Where the bytes of single experts lie in a checkpoint's files, for reading them without a map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harmonium.checkpoint.checkpoint import Checkpoint
from harmonium.checkpoint.gguf_checkpoint import GgufCheckpoint


@dataclass(frozen=True, slots=True)
class Piece:
    """One matrix of every expert of a layer: expert e's bytes begin at offset + e * nbytes of the file.

    column: which of the expert's parts it is: 0 gate_up, 1 its scales (or ggml's second matrix), 2 down,
    3 its scales.
    """

    column: int
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ExpertPieces:
    """A layer's experts. ggml: None for our layout, else (gate and up apart, nibbles split)."""

    pieces: tuple[Piece, ...]
    ggml: tuple[bool, bool] | None


def expert_pieces(checkpoint: Checkpoint, layer: int) -> ExpertPieces:
    """The pieces of a layer's MXFP4 experts, in the order in which a product needs them."""
    name, num_experts = f"layers.{layer}.experts", checkpoint.config.num_experts
    if isinstance(checkpoint, GgufCheckpoint):
        return _gguf_pieces(checkpoint, name, num_experts)
    pieces = []
    for column, part in enumerate(("gate_up.blocks", "gate_up.scales", "down.blocks", "down.scales")):
        info = checkpoint.tensors[f"{name}.{part}"]
        pieces.append(Piece(column, info.file, info.offset, info.nbytes // num_experts))
    return ExpertPieces(tuple(pieces), None)


def _gguf_pieces(checkpoint: GgufCheckpoint, name: str, num_experts: int) -> ExpertPieces:
    gate_up, down = checkpoint.ggml_experts(f"{name}.gate_up"), checkpoint.ggml_experts(f"{name}.down")
    pieces = []
    for column, stored in (*enumerate(gate_up.names), (2, down.names[0])):
        file, offset, nbytes = checkpoint.expert_span(stored)
        pieces.append(Piece(column, file, offset, nbytes // num_experts))
    return ExpertPieces(tuple(pieces), (gate_up.second is not None, gate_up.is_split))
