"""Settings, and the machine they are settled against; a folder of our own stands for /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from harmonium.config import EngineConfig, Hardware, environment_config, probe_hardware, resolve
from harmonium.errors import ConfigError

GIB = 1 << 30
MACHINE = Hardware(
    cores=(0, 1, 2, 3), memory_total_bytes=16 * GIB, memory_available_bytes=9 * GIB, isa=("scalar", "avx2")
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", "int4"),
        ("weights", None),
        ("kv_cache", "fp8"),
        ("kv_cache", None),
        ("isa", "sse9"),
        ("isa", 5),
        *(("context_length", value) for value in (0, -1, "5", 5.5, True, 1 << 25)),
        *(("max_sequences", value) for value in (0, None, 2.0, 5000)),
        *(("max_batch_tokens", value) for value in (0, None, float("nan"), 70_000)),
        *(("max_queue", value) for value in (-1, None, 2_000_000)),
        *(("threads", value) for value in (0, 257, "two", True)),
        *(("memory_limit_bytes", value) for value in (0, "14GiB", 1 << 61)),
        ("prefix_cache", "no"),
    ],
)
def test_setting_that_means_nothing_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is "):
        EngineConfig(**{name: value})


def test_what_is_left_open_is_settled_by_the_machine_with_a_reason() -> None:
    found = resolve(EngineConfig(), MACHINE)
    assert (found.isa, found.threads, found.memory_limit_bytes) == ("avx2", 4, 9 * GIB)
    assert set(found.reasons) == {"isa", "threads", "memory"}


def test_what_is_asked_for_wins() -> None:
    found = resolve(EngineConfig(isa="scalar", threads=9, memory_limit_bytes=GIB), MACHINE)
    assert (found.isa, found.threads, found.memory_limit_bytes) == ("scalar", 9, GIB)
    assert "more than the 4 cores" in found.reasons["threads"]


def test_instruction_set_that_the_machine_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="isa is 'avx512'; this processor has scalar, avx2"):
        resolve(EngineConfig(isa="avx512"), MACHINE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HARMONIUM_ISA", "sse9"),
        ("HARMONIUM_THREADS", "0"),
        ("HARMONIUM_THREADS", "-1"),
        ("HARMONIUM_THREADS", "x"),
    ],
)
def test_environment_that_means_nothing_is_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{name} is '{value}'"):
        environment_config()


def machine(root: Path, files: dict[str, str]) -> Hardware:
    """The hardware that these files describe, beside 8 GiB of memory of which 6 are free."""
    files = {"proc/meminfo": f"MemTotal: {8 << 20} kB\nMemAvailable: {6 << 20} kB\nHugePages: 0\n", **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return probe_hardware(("scalar",), root)


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def test_machine_without_limits_is_all_ours(tmp_path: Path, eight_cores: None) -> None:
    found = machine(tmp_path, {})
    assert found.cores == tuple(range(8))
    assert (found.memory_total_bytes, found.memory_available_bytes) == (8 * GIB, 6 * GIB)


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("250000 100000", 3), ("20000 100000", 1), ("1600000 100000", 8)]
)
def test_quota_of_a_cgroup_limits_the_cores(
    quota: str, cores: int, tmp_path: Path, eight_cores: None
) -> None:
    files = {"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/cpu.max": f"{quota}\n"}
    assert len(machine(tmp_path, files).cores) == cores


def test_limit_of_an_outer_cgroup_holds_too(tmp_path: Path, eight_cores: None) -> None:
    files = {
        "proc/self/cgroup": "0::/outer/inner\n",
        "sys/fs/cgroup/outer/memory.max": f"{2 * GIB}\n",
        "sys/fs/cgroup/outer/memory.current": f"{GIB}\n",
        "sys/fs/cgroup/outer/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
        "sys/fs/cgroup/outer/inner/memory.max": "max\n",
        "sys/fs/cgroup/outer/inner/memory.current": "1\n",
    }
    found = machine(tmp_path, files)
    assert (found.memory_total_bytes, found.memory_available_bytes) == (2 * GIB, 3 * GIB // 2)


def test_limits_of_cgroup_v1_hold(tmp_path: Path, eight_cores: None) -> None:
    files = {
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{2 * GIB}\n",
    }
    found = machine(tmp_path, files)
    assert len(found.cores) == 2
    assert (found.memory_total_bytes, found.memory_available_bytes) == (GIB, 0)


def test_files_that_hold_nonsense_are_no_limit(tmp_path: Path, eight_cores: None) -> None:
    files = {
        "proc/meminfo": "nothing here\n",
        "proc/self/cgroup": "garbage\n",
        "sys/fs/cgroup/cpu.max": "a b c\n",
        "sys/fs/cgroup/memory.max": "lots\n",
        "sys/fs/cgroup/memory.current": "many\n",
    }
    found = machine(tmp_path, files)
    assert len(found.cores) == 8
    assert found.memory_total_bytes == found.memory_available_bytes > 0
