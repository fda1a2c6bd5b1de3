"""An adapter made part of its model: a checkpoint in, a checkpoint out, a layer at a time. Needs no PyTorch.

The new folder has one file of weights for each layer and one for what lies outside the layers, in the Hugging
Face layout. Weights that the adapter does not change are copied as they are. Dense ones that it changes are
rounded to bf16, experts to MXFP4 again (or to bf16 where that is asked for): MXFP4 has about one and a half
digits, so a small change of an expert may be lost in the rounding. `MergeReport` says how much of it was.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint import Checkpoint, open_checkpoint
from harmonium.checkpoint.bfloat16 import decode_bfloat16, encode_bfloat16
from harmonium.checkpoint.lora import LoraAdapter, LowRank, open_lora
from harmonium.checkpoint.mxfp4 import decode_mxfp4, quantize_mxfp4
from harmonium.checkpoint.names import EMBEDDING, UNEMBEDDING, ExpertFormat, canonical_tensors, stored_name
from harmonium.checkpoint.safetensors import write_safetensors
from harmonium.checkpoint.shards import CONFIG_NAME, INDEX_NAME
from harmonium.errors import ConfigError
from harmonium.testing import huggingface_config

_Stored = tuple[str, str, npt.NDArray[Any]]

_COPIED = ("tokenizer", "generation_config", "special_tokens", "chat_template", "LICENSE", "USAGE_POLICY")
"""Beginnings of the names of small files that belong to a model beside its weights and config."""

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did.

    num_changed: matrices that the adapter changed. expert_change, expert_rounding: root mean square of what
    the adapter adds to experts' weights and of what rounding them changes; 0.0 where no expert was changed.
    A rounding much larger than the change means that the merged experts hold little of what was trained.
    """

    folder: Path
    expert_format: ExpertFormat
    num_changed: int
    expert_change: float
    expert_rounding: float


def merge_adapter(
    checkpoint: str | Path,
    adapter: str | Path,
    out: str | Path,
    experts: ExpertFormat | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Write the model that a checkpoint and an adapter are together to a new folder.

    out: must not exist, or be empty; it appears whole or not at all. experts: None keeps the checkpoint's
    format; "bf16" keeps more of a change of the experts, at nearly four times their memory.

    Raises ConfigError when the folder has files or cannot be written, and what `open_checkpoint` and
    `open_lora` raise.
    """
    out = Path(out)
    _refuse_full(out)
    with open_checkpoint(checkpoint) as opened:
        with open_lora(adapter, opened.config) as files:
            pairs = files.load()
        job = _Merge(opened, pairs, experts or opened.expert_format)
        temporary: Path | None = None
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
            job.write(temporary, progress)
            temporary.chmod(0o755)
            temporary.rename(out)
        except OSError as error:
            raise ConfigError(f"{out}: cannot be written ({error})") from None
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
    return job.report(out)


def _refuse_full(folder: Path) -> None:
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder}: exists; expected a new or an empty folder")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be looked at ({error})") from None


class _Merge:
    """One merge; the sums of squares are over the weights of changed experts."""

    def __init__(self, checkpoint: Checkpoint, adapter: LoraAdapter, experts: ExpertFormat) -> None:
        self.checkpoint, self.adapter, self.experts = checkpoint, adapter, experts
        self.num_changed = 0
        self.num_weights, self.change, self.rounding = 0, 0.0, 0.0

    def write(self, folder: Path, progress: Progress | None) -> None:
        """Write config, weights, index and the small files."""
        self._write_config(folder)
        shards: dict[str, list[str]] = {}
        for name, _, _ in canonical_tensors(self.checkpoint.config, self.experts):
            layer = (
                int(name.split(".")[1]) if name.startswith("layers.") else self.checkpoint.config.num_layers
            )
            shards.setdefault(f"model-{layer + 1:05d}.safetensors", []).append(name)
        weight_map: dict[str, str] = {}
        total = 0
        for done, (shard, names) in enumerate(sorted(shards.items())):
            if progress is not None:
                progress(done, len(shards))
            tensors = [tensor for name in names for tensor in self._merged(name)]
            write_safetensors(folder / shard, tensors)
            weight_map.update((stored, shard) for stored, _, _ in tensors)
            total += sum(array.nbytes for _, _, array in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
        for file in self.checkpoint.path.iterdir():
            if file.name.startswith(_COPIED) and file.is_file():
                shutil.copyfile(file, folder / file.name)
        if progress is not None:
            progress(len(shards), len(shards))

    def report(self, folder: Path) -> MergeReport:
        count = max(1, self.num_weights)
        roots = math.sqrt(self.change / count), math.sqrt(self.rounding / count)
        return MergeReport(folder, self.experts, self.num_changed, *roots)

    def _is_tied(self) -> bool:
        infos = self.checkpoint.tensors
        first, second = infos[EMBEDDING], infos[UNEMBEDDING]
        return (first.file, first.offset) == (second.file, second.offset)

    def _write_config(self, folder: Path) -> None:
        if self.checkpoint.layout == "huggingface":
            table = json.loads((self.checkpoint.path / CONFIG_NAME).read_text(encoding="utf-8"))
            table.pop("quantization_config", None)
            if self.experts == "mxfp4":
                table["quantization_config"] = {"quant_method": "mxfp4"}
        else:
            table = huggingface_config(self.checkpoint.config, self.experts, "rope_scaling", self._is_tied())
        (folder / CONFIG_NAME).write_text(json.dumps(table, indent=2), encoding="utf-8")

    def _merged(self, name: str) -> Iterator[_Stored]:
        """The stored tensors of a canonical one: none where another yields it, two for blocks and scales."""
        if name == UNEMBEDDING and self._is_tied():
            return
        stored = stored_name(name, "huggingface")
        if name.endswith(".scales"):
            return  # with the blocks
        base, _, kind = name.rpartition(".")
        pair = self._pair(base)
        if kind in ("blocks", "weight") and ".experts." in name:
            if pair is None and self.experts == self.checkpoint.expert_format:
                yield from self._copied(base, kind)
            else:
                yield from self._merged_experts(base, pair)
        elif kind == "weight" and pair is not None:
            self.num_changed += 1
            weight = decode_bfloat16(self.checkpoint.tensor(name)) + pair.delta()
            yield stored, "BF16", encode_bfloat16(weight)
        else:
            yield stored, "BF16", self.checkpoint.tensor(name)

    def _pair(self, base: str) -> LowRank | None:
        """The adapter's pair for "layers.3.attention.q" and the like."""
        if not base.startswith("layers."):
            return None
        _, layer, target = base.split(".", 2)
        return self.adapter.layers[int(layer)].get(target)

    def _copied(self, base: str, kind: str) -> Iterator[_Stored]:
        for part in (kind, "scales") if kind == "blocks" else (kind,):
            name = f"{base}.{part}"
            dtype = "BF16" if part == "weight" else "U8"
            yield stored_name(name, "huggingface"), dtype, self.checkpoint.tensor(name)

    def _merged_experts(self, base: str, pair: LowRank | None) -> Iterator[_Stored]:
        """All experts of a layer's matrix, one at a time in float32."""
        blocks, scales, weights = [], [], []
        for expert in range(self.checkpoint.config.num_experts):
            weight = self._expert(base, expert)
            delta = None if pair is None else pair.delta(expert)
            if delta is not None:
                weight = weight + delta
            if self.experts == "mxfp4":
                packed = quantize_mxfp4(weight)
                blocks.append(packed[0])
                scales.append(packed[1])
                kept = decode_mxfp4(*packed)
            else:
                weights.append(np.ascontiguousarray(encode_bfloat16(weight).T))
                kept = decode_bfloat16(weights[-1]).T
            if delta is not None:
                self.num_changed += 1
                self.num_weights += weight.size
                self.change += float(np.square(delta, dtype=np.float64).sum())
                self.rounding += float(np.square(kept - weight, dtype=np.float64).sum())
        for part, listed in (("blocks", blocks), ("scales", scales), ("weight", weights)):
            if listed:
                dtype = "BF16" if part == "weight" else "U8"
                yield stored_name(f"{base}.{part}", "huggingface"), dtype, np.stack(listed)

    def _expert(self, base: str, expert: int) -> npt.NDArray[np.float32]:
        """One expert's matrix [outputs, inputs]."""
        read = self.checkpoint.tensor
        if self.checkpoint.expert_format == "bf16":
            return np.asarray(decode_bfloat16(read(f"{base}.weight")[expert]).T)
        blocks, scales = read(f"{base}.blocks"), read(f"{base}.scales")
        return decode_mxfp4(blocks[expert], scales[expert])
