"""Recorded calls of kernels."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from harmonium.kernels.ops import rms_norm
from harmonium.kernels.program import Program


def test_a_program_runs_what_was_called_while_it_was_recorded() -> None:
    x, out = np.ones((1, 32), np.float32), np.zeros((1, 32), np.float32)
    weight = np.full(32, 2, np.float32)
    program = Program()
    with program.recording():
        with pytest.raises(ValueError, match="records another program"), Program().recording():
            pass
        with pytest.raises(ValueError, match="is being recorded"):
            program.run()
        rms_norm(x, weight, 0.0, out)
    assert len(program) == 1 and not out.any()
    program.run()
    np.testing.assert_allclose(out, 2)
    x[:], weight[:] = -3, 5
    program.run()
    np.testing.assert_allclose(out, -5)
    rms_norm(x, weight, 0.0, out)  # is done at once again
    assert len(program) == 1


def test_only_the_recording_thread_is_recorded() -> None:
    x, out = np.ones((1, 32), np.float32), np.zeros((1, 32), np.float32)
    program = Program()
    with program.recording():
        thread = threading.Thread(target=rms_norm, args=(x, x[0], 0.0, out))
        thread.start()
        thread.join()
    assert len(program) == 0 and out.all()


def test_an_error_ends_the_recording_and_a_run() -> None:
    x, out = np.ones((1, 32), np.float32), np.zeros((1, 32), np.float32)
    program = Program()
    with pytest.raises(ValueError, match="weight has shape"), program.recording():
        rms_norm(x, x[0, :16].copy(), 0.0, out)
    rms_norm(x, x[0], 0.0, out)
    assert len(program) == 0 and out.all()
