"""Checkpoints: bytes on disk -> named arrays, memory-mapped and checked before a view is handed out."""

from harmonium.checkpoint.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from harmonium.checkpoint.model_config import LayerKind, ModelConfig, RopeConfig

__all__ = ["Checkpoint", "LayerKind", "ModelConfig", "RopeConfig", "TensorInfo", "open_checkpoint"]
