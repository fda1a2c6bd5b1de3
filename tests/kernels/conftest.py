"""What the tests of kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harmonium.kernels import runtime


@pytest.fixture(params=runtime.supported_isa())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn, on two threads."""
    before = runtime.current_isa(), runtime.current_threads()
    runtime.configure(request.param, 2)
    yield request.param
    runtime.configure(*before)
