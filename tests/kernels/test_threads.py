"""The pool of threads behind every kernel: several callers, changing numbers, forks."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from harmonium.kernels import matmul, runtime

Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint16]
Bytes = npt.NDArray[np.uint8]


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bf16(x: Floats) -> Bits:
    return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)


def test_callers_on_several_python_threads_get_their_own_results(isa: str) -> None:
    """More pool threads than cores, three callers at once: jobs are small, so workers often come too late."""
    runtime.configure(isa, 6)
    weight = matmul.quantize_weight(bf16(normal(1, 256, 64)))
    inputs = [normal(seed, 1 + seed, 64) for seed in range(3)]
    expected = [np.zeros((len(x), 256), np.float32) for x in inputs]
    for x, out in zip(inputs, expected, strict=True):
        matmul.linear_int8(x, weight, None, out)

    def repeat(caller: int) -> int:
        wrong = 0
        for _ in range(300):
            out = np.full_like(expected[caller], np.nan)
            matmul.linear_int8(inputs[caller], weight, None, out)
            wrong += not np.array_equal(out, expected[caller])
        return wrong

    with ThreadPoolExecutor(3) as callers:
        assert list(callers.map(repeat, range(3))) == [0, 0, 0]


def test_number_of_threads_may_change_between_calls(isa: str) -> None:
    weight, x = bf16(normal(1, 100, 64)), normal(2, 3, 64)
    results = []
    for threads in (1, 4, 2, 7, 1, 3):
        runtime.configure(isa, threads)
        assert runtime.current_threads() == threads
        out = np.zeros((3, 100), np.float32)
        matmul.linear_bf16(x, weight, None, out)
        results.append(out.tobytes())
    assert len(set(results)) == 1


def test_a_forked_child_computes_alone(isa: str) -> None:
    """A child has none of the pool's threads; it must neither hang nor crash."""
    runtime.configure(isa, 3)
    weight, x, out = bf16(normal(1, 100, 64)), normal(2, 1, 64), np.zeros((1, 100), np.float32)
    matmul.linear_bf16(x, weight, None, out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads: they are the test
        child = os.fork()
    if child == 0:
        again = np.zeros((1, 100), np.float32)
        matmul.linear_bf16(x, weight, None, again)
        os._exit(0 if np.array_equal(out, again) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_fork_in_the_middle_of_a_kernel_leaves_the_child_usable() -> None:
    """A lock that another thread holds at that moment must not stay locked in the child."""
    weight, x, out = bf16(normal(1, 2000, 256)), normal(2, 8, 256), np.zeros((8, 2000), np.float32)
    matmul.linear_bf16(x, weight, None, out)
    stop = threading.Event()

    def compute() -> None:
        mine = np.zeros_like(out)
        while not stop.is_set():
            matmul.linear_bf16(x, weight, None, mine)

    caller = threading.Thread(target=compute)
    caller.start()
    statuses = []
    for _ in range(10):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            signal.alarm(10)  # a child that hangs is killed, and fails the test
            again = np.zeros_like(out)
            matmul.linear_bf16(x, weight, None, again)
            os._exit(0 if np.array_equal(out, again) else 1)
        statuses.append(os.waitpid(child, 0)[1])
    stop.set()
    caller.join()
    assert statuses == [0] * 10


def test_the_same_settings_again_disturb_no_kernel_that_runs(isa: str) -> None:
    """A second engine in the process sets what the first one set, while that one computes."""
    runtime.configure(isa, 3)
    weight, x = matmul.quantize_weight(bf16(normal(1, 256, 64))), normal(2, 9, 64)
    expected = np.zeros((9, 256), np.float32)
    matmul.linear_int8(x, weight, None, expected)

    def repeat() -> int:
        wrong = 0
        for _ in range(500):
            out = np.zeros((9, 256), np.float32)
            matmul.linear_int8(x, weight, None, out)
            wrong += not np.array_equal(out, expected)
        return wrong

    with ThreadPoolExecutor(1) as other:
        wrong = other.submit(repeat)
        while not wrong.done():
            runtime.configure(isa, 3)
    assert wrong.result() == 0
