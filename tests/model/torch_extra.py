"""Skips a test module where the extra [torch] is not installed, as a plain run allows."""

from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", reason="the extra [torch] is not installed")
# More threads than free cores make small products wait for each other: hundreds of times the time.
torch.set_num_threads(1)
