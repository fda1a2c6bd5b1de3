"""Settings: the same keys in TOML and on the command line, and every wrong one named. No PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from harmonium.errors import ConfigError
from harmonium.finetune.settings import KEYS, FinetuneSettings, read_settings
from harmonium.finetune_options import given_settings, option_keys
from harmonium.options import parse

needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 reads no TOML by itself")


def given(*words: str) -> dict[str, Any]:
    return given_settings(parse(["finetune", *words]))


def test_options_and_settings_are_the_same_keys() -> None:
    assert option_keys() | {"model"} == set(KEYS)


def test_the_command_line_gives_only_what_it_says() -> None:
    assert given("base") == {}
    assert given("base", "--rank", "4", "--targets", "experts,router", "--resume", "--lr", "1e-3") == {
        "rank": 4,
        "targets": ("experts", "router"),
        "resume": True,
        "lr": 1e-3,
    }


@needs_toml
def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'model = "base"\nrank = 4\nbatch-tokens = 900\nlr = 1\ntargets = ["router"]\nresume = true\n'
    )
    settings = read_settings(path, given("--rank", "16", "--no-resume"))
    assert settings == FinetuneSettings(
        model="base", rank=16, batch_tokens=900, lr=1.0, targets=("router",), resume=False
    )


@needs_toml
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak = 4", r"run\.toml: no setting 'rnak'; did you mean rank\?"),
        ('rank = "4"', r"rank is '4'; expected a whole number from 1 to 1,024"),
        ("rank = true", r"rank is True"),
        ("epochs = 0", r"epochs is 0; expected a whole number from 1"),
        ("epochs = 1.5", r"epochs is 1\.5"),
        ('method = "qlora"', r"method is 'qlora'; expected one of lora, full"),
        ('targets = ["attention", "attention"]', r"targets is .*each once"),
        ("resume = 1", r"resume is 1; expected true or false"),
        ("data = 3", r"data is 3; expected text"),
        ("validation = 1.5", r"validation is 1\.5; expected a file, or a share"),
        ("early_stopping = 3", r"early_stopping needs validation"),
        ('from_scratch = "c.json"', r"expected method 'full'"),
        ("rank = ", r"run\.toml is no TOML"),
        ("save-every = 3\nsave_every = 4", r"given twice"),
    ],
)
def test_a_wrong_line_of_the_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_settings(path, {})


def test_a_share_or_a_file_validates() -> None:
    assert read_settings(None, given("--validation", "0.1")).validation == 0.1
    assert read_settings(None, given("--validation", "held.jsonl")).validation == "held.jsonl"


def test_defaults_depend_on_the_method() -> None:
    lora, full = FinetuneSettings(), FinetuneSettings(method="full")
    scratch = FinetuneSettings(method="full", from_scratch="c.json")
    assert [each.learning_rate for each in (lora, full, scratch)] == [2e-4, 2e-5, 1e-3]
    assert (lora.balance_weight, full.balance_weight) == (0.0, 0.01)
    assert FinetuneSettings(targets=("router",)).balance_weight == 0.01
    assert lora.lora_alpha == 16.0
