"""What streamed experts take: the sizes that a memory plan needs before a file is read."""

from __future__ import annotations

from harmonium.checkpoint.model_config import ModelConfig

ALIGNMENT = 4096
"""Of offsets, lengths and memory of direct reads: what every disk accepts."""

STREAMED_BATCH_TOKENS = (4096, 2048, 1024)
"""Tokens of a step, the longest first, that are tried where more was not asked for."""

GUESS_ROWS = 256
"""Tokens of a step that the next layer's experts are guessed from: so many meet nearly all that all meet."""

_SPARE_BYTES = 1 << 30
_SPARE_SHARE = 16


def slot_bytes(config: ModelConfig) -> int:
    """Of one expert in memory: at most four pieces, each at any place within a block of the disk."""
    matrices = 3 * config.expert_size * config.hidden_size // 32 * 17
    return -(-matrices // ALIGNMENT) * ALIGNMENT + 8 * ALIGNMENT


def least_slots(config: ModelConfig) -> int:
    """Experts of a token, and as many that are read meanwhile."""
    return 2 * config.num_active_experts


def spare_bytes(limit_bytes: int) -> int:
    """What streamed experts leave to other programs, for they take all the rest."""
    return min(_SPARE_BYTES, limit_bytes // _SPARE_SHARE)


def stream_scratch_bytes(config: ModelConfig, max_batch_tokens: int) -> int:
    """Parts of a step's results, float32 [T, A, D], and the rows that experts are guessed from."""
    A, D = config.num_active_experts, config.hidden_size
    rows = min(GUESS_ROWS, max_batch_tokens)
    return 4 * (max_batch_tokens * A * D + rows * (D + 2 * A))
