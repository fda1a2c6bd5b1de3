"""The table of attention implementations, over every kind of device that people have."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from harmonium.config import ATTENTION_NAMES, EngineConfig
from harmonium.engine.create import plan_engine
from harmonium.errors import ConfigError
from harmonium.model.attention import AUTO_ORDER, NAMES, TABLE, Case, Device, Dtype, choose_attention

GOLDEN = Path(__file__).parents[1] / "golden" / "attention.txt"

CAPABILITIES = ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
DEVICES = (Device("cpu"), *(Device("cuda", capability) for capability in CAPABILITIES), Device("rocm"))
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
PACKAGES: Mapping[str, Mapping[str, str]] = {
    "old torch": {},
    "torch": {"torch>=2.9": ""},
    "triton": {"torch>=2.9": "", "triton": ""},
    "flash": {"torch>=2.9": "", "flash_attn": "", "flash_attn_interface": ""},
    "all": {"torch>=2.9": "", "triton": "", "flash_attn": "", "flash_attn_interface": ""},
    "broken": {
        "torch>=2.9": "",
        "flash_attn": "does not import (ImportError: undefined symbol)",
        "flash_attn_interface": "is too old",
    },
}


def _cases(packages: Mapping[str, str], device: Device, dtype: Dtype) -> list[Case]:
    kinds = itertools.product((True, False), (True, False))
    return [Case(device, dtype, packages, sinks, window) for sinks, window in kinds]


def _row(device: Device, dtype: Dtype, packages: str) -> str:
    """One line of the golden file: what "auto" takes, and everything that can be forced."""
    found = set()
    for case in _cases(PACKAGES[packages], device, dtype):
        usable = [row.name for row in TABLE if row.engine == "torch" and row.obstacle(case) is None]
        found.add((choose_attention("auto", case).name, " ".join(usable)))
    # Sinks and windows rule nothing out: whatever runs is made right.
    ((auto, usable_names),) = found
    return f"{device!s:<10} {dtype:<9} {packages:<10} {auto:<7} {usable_names}"


def test_golden_table() -> None:
    rows = [_row(*key) for key in itertools.product(DEVICES, DTYPES, PACKAGES)]
    header = f"{'device':<10} {'dtype':<9} {'packages':<10} {'auto':<7} can be forced"
    text = "\n".join([header, *rows]) + "\n"
    if os.environ.get("HARMONIUM_WRITE_GOLDEN"):
        GOLDEN.write_text(text)
    assert GOLDEN.read_text() == text, "run with HARMONIUM_WRITE_GOLDEN=1, and read what changed"


@pytest.mark.parametrize("packages", PACKAGES)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_auto_finds_one_that_runs_and_says_why(device: Device, packages: str) -> None:
    for dtype in DTYPES:
        for case in _cases(PACKAGES[packages], device, dtype):
            choice = choose_attention("auto", case)
            (row,) = (row for row in TABLE if row.name == choice.name)
            assert row.engine == "torch" and row.obstacle(case) is None
            assert str(choice).startswith(f"{row.name} on {device}, {dtype} (the first choice")
            assert "\n" not in str(choice)
            assert ("sinks" in choice.reason) is case.has_sinks
            better = AUTO_ORDER[device.kind][: AUTO_ORDER[device.kind].index(row.name)]
            assert all(name in choice.reason for name in better), "what was passed over is named"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "native"])
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_forced_one_runs_or_names_what_is_missing(device: Device, name: str) -> None:
    """Never for want of sinks or windows."""
    (row,) = (row for row in TABLE if row.name == name)
    for packages, dtype in itertools.product(PACKAGES.values(), DTYPES):
        for case in _cases(packages, device, dtype):
            if row.obstacle(case) is None:
                choice = choose_attention(name, case)
                assert choice.name == name and choice.reason.startswith("asked for")
                continue
            with pytest.raises(ConfigError, match=f"attention is '{name}', which (needs|computes)") as caught:
                choose_attention(name, case)
            assert "expected auto, " in str(caught.value)
            assert "sink" not in str(caught.value) and "window" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "device", "packages", "message"),
    [
        ("flash3", Device("cuda", (8, 0)), "all", "needs compute capability 9.x, and this device has 8.0"),
        ("flash3", Device("cuda", (12, 0)), "all", "needs compute capability 9.x, and this device has 12.0"),
        ("triton", Device("cuda", (7, 5)), "all", "needs compute capability 8.0 or later"),
        ("triton", Device("cuda", (9, 0)), "torch", "needs triton, which is not installed"),
        ("triton", Device("cpu"), "all", "needs a device of kind cuda, and this is cpu"),
        ("flash2", Device("cuda", (8, 0)), "broken", "needs flash_attn, which does not import (ImportError"),
        ("flash3", Device("cuda", (9, 0)), "broken", "needs flash_attn_interface, which is too old"),
        ("flash2", Device("rocm"), "all", "needs a device of kind cuda, and this is rocm"),
        ("native", Device("cpu"), "all", "attention is 'native' and engine is 'torch'"),
    ],
)
def test_refusal_names_the_obstacle(name: str, device: Device, packages: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_attention(name, Case(device, device.dtype, PACKAGES[packages]))
    assert message in str(caught.value)


def test_float32_rules_flash_attention_out() -> None:
    with pytest.raises(ConfigError, match=r"flash2.* computes in bfloat16 or float16, .* float32"):
        choose_attention("flash2", Case(Device("cuda", (9, 0)), "float32", PACKAGES["all"]))


def test_interpreted_triton_runs_on_a_cpu_when_it_is_asked_for_and_never_unasked() -> None:
    case = Case(Device("cpu"), "float32", PACKAGES["all"], is_interpreted=True)
    assert choose_attention("triton", case).name == "triton"
    assert choose_attention("auto", case).name == "eager"


def test_cards_without_bf16_products_get_float32() -> None:
    assert [device.dtype for device in DEVICES] == ["float32"] * 3 + ["bfloat16"] * 7


def test_options_know_every_row() -> None:
    assert set(ATTENTION_NAMES) == {"auto", *NAMES}
    assert all(set(order) <= set(NAMES) for order in AUTO_ORDER.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "xformers"}, "attention is 'xformers'; expected one of auto, native, triton"),
        ({"device": "tpu"}, "device is 'tpu'; expected 'auto', 'cpu' or 'cuda'"),
        ({"device": "cuda"}, "device is 'cuda' and engine is 'native'"),
    ],
)
def test_settings_are_checked(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**settings)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_native_engine_has_its_own_attention_and_no_other(tmp_path: Path) -> None:
    from harmonium.testing import make_tiny_checkpoint

    folder = make_tiny_checkpoint(tmp_path / "tiny", vocabulary_size=300)
    for name in ("auto", "native"):
        with_plan = plan_engine(folder, EngineConfig(attention=name))
        assert str(with_plan.attention).startswith("native (our paged attention; sinks and windows")
        with_plan.close()
    with pytest.raises(ConfigError, match="attention is 'sdpa' and engine is 'native'; expected 'auto'"):
        plan_engine(folder, EngineConfig(attention="sdpa"))
