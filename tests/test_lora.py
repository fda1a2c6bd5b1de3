"""LoRA adapters in the Python API and on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harmonium import LLM, SamplingParams, cli
from harmonium.checkpoint import open_checkpoint
from harmonium.checkpoint.lora import open_lora
from harmonium.config import LoraSource
from harmonium.errors import ConfigError, RequestError
from harmonium.llm_input import engine_config
from harmonium.model.reference import ReferenceModel
from harmonium.testing import make_tiny_checkpoint, tiny_config
from tests.lora_files import make_lora
from tests.model.rounded_reference import typical_error

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_stop=True)
PROMPT = [5, 17, 400, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("lora") / "tiny")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_lora(folder / name, tiny_config(), seed=seed) for seed, name in enumerate(("a", "b"))}


@pytest.fixture(scope="module")
def llm(model: Path, adapters: dict[str, Path]) -> Iterator[LLM]:
    with LLM(model, context_length=256, threads=1, weights="bf16", lora=adapters) as opened:
        yield opened


def test_logits_are_those_of_the_adapter(llm: LLM, model: Path, adapters: dict[str, Path]) -> None:
    assert llm.info.adapters == ("a", "b")
    with open_checkpoint(model) as checkpoint:
        for name in (None, "a", "b"):
            adapter = None if name is None else open_lora(adapters[name], checkpoint.config).load()
            expected = ReferenceModel(checkpoint, adapter=adapter).logits(PROMPT)
            assert typical_error(llm.logits(PROMPT, lora=name), expected) < 0.02


def test_each_prompt_may_have_its_adapter(llm: LLM) -> None:
    together = llm.generate([PROMPT] * 3, GREEDY, lora=[None, "a", "b"])
    alone = [llm.generate(PROMPT, GREEDY, lora=name)[0] for name in (None, "a", "b")]
    assert [found.tokens for found in together] == [found.tokens for found in alone]
    assert len({found.tokens for found in together}) == 3
    events = list(llm.stream_tokens(PROMPT, GREEDY, lora="b"))
    assert tuple(token for event in events for token in event.tokens) == together[2].tokens
    with pytest.raises(RequestError, match="there are 3 prompts and 2 adapters"):
        llm.generate([PROMPT] * 3, GREEDY, lora=["a", "b"])
    with pytest.raises(RequestError, match="there is no adapter 'c'; there is a, b"):
        llm.generate(PROMPT, GREEDY, lora="c")


def test_a_turn_of_an_adapter_is_its_own(llm: LLM) -> None:
    settings = SamplingParams(temperature=0.0, max_tokens=30)
    turns = [llm.chat("Hello", sampling=settings, current_date="", lora=name) for name in (None, "a", "b")]
    assert len({turn.token_ids for turn in turns}) == 3
    *_, last = llm.stream("Hello", sampling=settings, current_date="", lora="a")
    assert last.token_ids == turns[1].token_ids  # type: ignore[union-attr]
    with pytest.raises(RequestError, match="no adapter 'c'"):
        llm.chat("Hello", lora="c")


def test_settings_take_names_with_folders() -> None:
    sources = (LoraSource("a", Path("x")),)
    assert engine_config({"lora": {"a": "x"}}).lora == sources
    assert engine_config({"lora": {"a": Path("x")}}).lora == sources
    assert engine_config({"lora": sources}).lora == sources
    for wrong in ("x", ["x"], {"a": 1}, {1: "x"}, None):
        with pytest.raises(ConfigError, match="expected names with folders"):
            engine_config({"lora": wrong})


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(words)
    return code, *capsys.readouterr()


def test_generate_and_chat_use_the_adapter(
    model: Path, adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    common = [str(model), "--json", "--temperature", "0", "--max-tokens", "8", "--threads", "1"]
    common += ["--context-length", "512"]
    outputs: dict[str, list[Any]] = {"generate": [], "chat": []}
    for options in ([], ["--lora", str(adapters["a"])], ["--lora", f"x={adapters['b']}"]):
        for command, words in (("generate", ["--prompt", "Hello"]), ("chat", ["Hello"])):
            line = [command, *common[:1], *words, *common[1:], *options]
            code, out, err = run(line, capsys)
            assert code == 0, err
            outputs[command].append(json.loads(out))
    for records in outputs.values():
        assert [record["model"] for record in records] == ["tiny", "a", "x"]
        assert len({tuple(record["token_ids"]) for record in records}) == 3


def test_inspect_counts_adapters(
    model: Path, adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word for name, path in adapters.items() for word in ("--lora", f"{name}={path}")]
    code, out, _ = run(["inspect", str(model), *options], capsys)
    assert code == 0
    assert "adapters" in out and "2, with what a step needs for them" in out
    code, out, _ = run(["inspect", str(model), "--json", *options], capsys)
    report = json.loads(out)
    assert report["adapters"]["a"]["path"] == str(adapters["a"])
    assert report["adapters"]["a"]["max_rank"] == 3
    sizes = sum(adapter["bytes"] for adapter in report["adapters"].values())
    assert sizes < report["memory"]["adapter_bytes"] < sizes + (1 << 20)
    code, out, _ = run(["inspect", str(model)], capsys)
    assert "adapters" not in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ["chat", "MODEL", "hi", "--lora", "a=x", "--lora", "b=y"],
            2,
            "--lora is given 2 times; chat uses one",
        ),
        (
            ["generate", "MODEL", "--prompt", "x", "--lora", "sql=no/such"],
            2,
            "adapter 'sql': no/such: does not",
        ),
        (["generate", "MODEL", "--prompt", "x", "--lora", "a b=x"], 2, "adapter name is 'a b'"),
        (["inspect", "MODEL", "--lora", "sql=MODEL"], 1, "holds no adapter_config.json"),
        (["bench", "MODEL", "--lora", "a=x"], 2, "no option --lora"),
    ],
)
def test_mistakes_with_adapters_cost_one_line(
    words: list[str], code: int, message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("MODEL", str(model)) for word in words]
    found, out, err = run(given, capsys)
    assert (found, out) == (code, "")
    assert message in err and len(err.splitlines()) == 1
