"""What the Triton kernels share. Their modules need the extra [cuda]; nothing else imports Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from harmonium.config import environment_text

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def product_type(dtype: torch.dtype) -> Any:
    """What tiles are multiplied in: the dtype itself.

    Triton's interpreter has no bf16 products and gives nonsense; there float32 holds the same numbers.
    """
    return _TYPES[dtype] if is_compiled() else tl.float32


def is_compiled() -> bool:
    """Whether kernels become machine code, which can hold what Triton's interpreter cannot."""
    return environment_text("TRITON_INTERPRET") != "1"
