"""Skips a test module where Triton is not installed; its interpreter runs the kernels (tests/conftest.py)."""

from typing import Any

import pytest

from tests.model.torch_extra import torch

triton: Any = pytest.importorskip("triton", reason="Triton is not installed (the extra [cuda])")

assert torch is not None

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    # Its interpreter takes an array of one number as an index, which NumPy 2.4 refuses.
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_with_index(tensor: Any) -> None:
        _patch(tensor)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_with_index
