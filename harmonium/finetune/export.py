"""A trained model -> an ordinary checkpoint in the Hugging Face layout.

Dense weights are rounded to bf16, float experts to MXFP4 (or bf16), frozen MXFP4 experts are written as they
are. The folder opens like any other: `open_checkpoint`, Transformers, `harmonium serve`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from harmonium.checkpoint import ModelConfig
from harmonium.checkpoint.mxfp4 import quantize_mxfp4
from harmonium.checkpoint.names import ExpertFormat
from harmonium.checkpoint.safetensors import write_safetensors
from harmonium.checkpoint.shards import CONFIG_NAME
from harmonium.errors import ConfigError
from harmonium.finetune.state import as_stored
from harmonium.model.torch import TorchModel
from harmonium.testing import huggingface_config

WEIGHTS_NAME = "model.safetensors"

COPIED = ("tokenizer", "generation_config", "special_tokens", "chat_template", "LICENSE", "USAGE_POLICY")
"""Beginnings of the names of small files that belong to a model beside its weights and config."""

_Stored = tuple[str, str, npt.NDArray[Any]]


def export_checkpoint(
    model: TorchModel, folder: str | Path, experts: ExpertFormat = "mxfp4", source: str | Path | None = None
) -> None:
    """Write config.json and model.safetensors, and copy the small files of `source` beside them.

    folder: made where there is none; other files in it stay. A reader never meets half a checkpoint: the
    config comes last. Raises ConfigError when it cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        write_safetensors(folder / WEIGHTS_NAME, stored_tensors(model, experts))
        if source is not None:
            for file in Path(source).iterdir():
                if file.name.startswith(COPIED) and file.is_file():
                    shutil.copyfile(file, folder / file.name)
        text = json.dumps(_config(model.config, experts), indent=2)
        temporary = folder / f".{CONFIG_NAME}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / CONFIG_NAME)
    except OSError as error:
        raise ConfigError(f"{folder}: the model cannot be written ({error.strerror or error})") from None


def stored_tensors(model: TorchModel, experts: ExpertFormat) -> Iterator[_Stored]:
    """(name, dtype, bits) of every tensor of the checkpoint."""
    for name, tensor in model.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            yield name, *as_stored(tensor if tensor.dtype == torch.uint8 else _rounded(tensor))
        elif experts == "bf16":
            yield name, *as_stored(_rounded(tensor))
        else:
            packed = [quantize_mxfp4(matrix.float().mT.contiguous().numpy()) for matrix in tensor]
            yield f"{name}_blocks", "U8", np.stack([blocks for blocks, _ in packed])
            yield f"{name}_scales", "U8", np.stack([scales for _, scales in packed])


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.bfloat16)


def _config(config: ModelConfig, experts: ExpertFormat) -> dict[str, object]:
    return huggingface_config(config, experts, "rope_scaling", tied=False)
