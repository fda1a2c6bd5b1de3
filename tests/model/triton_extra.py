"""Skips a test module where Triton is not installed; its interpreter runs the kernels (tests/conftest.py).

With TRITON_INTERPRET=0 in the environment they are compiled, and run on this machine's GPU.
"""

import os
from typing import Any

import pytest

from tests.model.torch_extra import torch

triton: Any = pytest.importorskip("triton", reason="Triton is not installed (the extra [cuda])")

IS_COMPILED = os.environ["TRITON_INTERPRET"] != "1"

if IS_COMPILED and not torch.cuda.is_available():
    pytest.skip("TRITON_INTERPRET is not 1 and PyTorch finds no GPU", allow_module_level=True)

THERE = torch.device("cuda" if IS_COMPILED else "cpu")
"""Where the kernels run."""

if not IS_COMPILED and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    # Its interpreter takes an array of one number as an index, which NumPy 2.4 refuses.
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_with_index(tensor: Any, *more: Any) -> None:  # 3.6 gives a scope too
        _patch(tensor, *more)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_with_index
