"""The command line's promises: one line for a mistake, the right exit code, clean pipes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from harmonium import __version__, cli, loading, options
from harmonium.config import EngineConfig
from harmonium.engine.protocol import Token
from harmonium.engine.scripted import Script, ScriptedEngine
from harmonium.errors import ConfigError
from harmonium.harmony.vocabulary import vocabulary
from harmonium.testing import make_tiny_checkpoint
from tests.scripted_chat import FINAL, REASONED, gen


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint, small because its vocabulary is."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("cli") / "model", vocabulary_size=512)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    return use(monkeypatch, ScriptedEngine([gen(REASONED)]))


def use(monkeypatch: pytest.MonkeyPatch, engine: ScriptedEngine) -> ScriptedEngine:
    monkeypatch.setattr(loading, "load_engine", lambda path, config: engine)
    return engine


def lines(text: str) -> list[str]:
    return text.splitlines()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "which command"),
        (["chta", "x"], "no command 'chta'; did you mean chat?"),
        (["--verison"], "no option --verison; did you mean --version?"),
        (["chat", "x", "hi", "--efort", "low"], "no option --efort; did you mean --effort?"),
        (["chat", "x", "hi", "there"], "one word too many: 'there'"),
        (["chat", "x", "hi", "--effort", "huge"], "--effort"),
        (["chat", "x", "--json"], "--json needs a question"),
        (["chat", "x", " "], "the question is empty"),
        (["chat", "x", "hi", "--temperature", "hot"], "--temperature: invalid float value: 'hot'"),
        (["chat", "x", "hi", "--temperature", "nan"], "temperature is nan"),
        (["chat", "x", "hi", "--max-tokens", "0"], "max_tokens is 0"),
        (["chat", "x", "hi", "--load", "nowhere.json"], "nowhere.json: No such file"),
        (["generate", "x"], "--prompt --tokens is required"),
        (["generate", "x", "--prompt", "a", "--tokens", "b"], "not allowed with"),
        (["generate", "x", "--prompt", "a", "--logprobs", "21"], "logprobs is 21"),
        (["inspect", "x", "--threads", "0"], "threads is 0"),
        (["inspect", "x", "--isa", "sse9"], "invalid choice: 'sse9'"),
        (["inspect", "x", "--weights", "int4"], "invalid choice: 'int4'"),
        (["inspect", "x", "--memory-limit", "lots"], "'lots' is no size"),
        (["inspect", "/no/such/place"], "/no/such/place"),
        (["bench", "x", "--prefill", "12,a"], "'a' is not a whole number above 0"),
        (["bench", "x", "--depth", "-1"], "--depth: '-1' is not a whole number from 0"),
        (["inspect", ""], "the model's path is empty"),
        (["inspect", "~no-such-user-at-all/x"], "~no-such-user-at-all/x"),
        (["generate", "x", "--tokens", "nowhere"], "nowhere: No such file"),
        (["serve", "x", "--host", "0.0.0.0"], "no API key is set"),
        (["serve", "x", "--dtype", "float16"], "use --weights bf16"),
        (["serve", "x", "--gpu-memory-utilization", "0.9"], "use --memory-limit"),
        (["serve", "x", "-tp", "2"], "one process serves one machine"),
        (["serve", "x", "--effort", "huge"], "reasoning effort is 'huge'"),
        (["serve", "x", "--date", "2026-13-01"], "date is '2026-13-01'"),
        (["serve", "x", "--limit", "frogs=1"], "--limit is 'frogs=1'"),
        (["serve", "x", "--port", "70000"], "port is 70,000"),
        (["serve", "x", "--engine", "script:y"], "both MODEL and --engine"),
        (["serve", "--engine", "vllm=x"], "'x' is no address of a server"),
    ],
)
def test_mistake_costs_one_line_and_exit_code_2(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(lines(err)) == 1
    assert err.startswith("harmonium: ")
    assert expected in err


def test_path_that_is_nearly_right_is_suggested(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(model.with_name("modle"))]) == 2
    assert "did you mean model?" in capsys.readouterr().err


def test_broken_checkpoint_is_one_line_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert len(lines(capsys.readouterr().err)) == 1


@pytest.mark.parametrize("words", [["--help"], ["chat", "--help"], ["bench", "--help"]])
def test_help_is_no_mistake(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("usage: harmonium")


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"harmonium {__version__}\n"


def test_answer_goes_to_stdout_alone(engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "x", "Hello"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("Hi there\n", "")


def test_reasoning_goes_to_stderr_when_asked_for(
    engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["chat", "x", "Hello", "--show-reasoning"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("Hi there\n", "think hard\n")


def test_chat_options_reach_prompt_and_sampling(engine: ScriptedEngine) -> None:
    words = "--effort high --system Answer_in_French. --max-tokens 9 --temperature 0.5 --seed 3 --top-k 7"
    assert cli.main(["chat", "x", "Hello", *words.split()]) == 0
    prompt = vocabulary().decode(engine.requests[0].token_ids)
    assert "Reasoning: high" in prompt
    assert "Answer_in_French." in prompt
    assert "<|start|>user<|message|>Hello<|end|>" in prompt
    sampling = engine.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed, sampling.top_k) == (9, 0.5, 3, 7)


def test_question_dash_reads_stdin(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert cli.main(["chat", "x", "-"]) == 0
    assert "from a pipe" in vocabulary().decode(engine.requests[0].token_ids)


def test_stdin_that_is_no_text_is_read_with_replacements(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?"), encoding="utf-8"))
    assert cli.main(["chat", "x", "-"]) == 0
    assert "caf\ufffd?" in vocabulary().decode(engine.requests[0].token_ids)


def test_chat_json_holds_the_whole_turn(engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "x", "Hello", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["content"], record["reasoning"], record["finish_reason"]) == (
        "Hi there",
        "think hard",
        "stop",
    )
    assert tuple(record["token_ids"]) == gen(REASONED)
    assert record["usage"]["completion_tokens"] == len(gen(REASONED))
    assert record["usage"]["reasoning_tokens"] == 2


def test_cut_off_answer_is_noted_on_stderr(
    engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["chat", "x", "Hello", "--max-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hi\n"
    assert err == "harmonium: the answer is cut off after 12 tokens\n"


def test_failing_engine_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, ScriptedEngine([Script(gen("<|channel|>final<|message|>ha"), error="it\nbroke")]))
    assert cli.main(["chat", "x", "Hello"]) == 1
    assert capsys.readouterr().err == "harmonium: it broke\n"


def test_generate_streams_the_continuation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = use(monkeypatch, ScriptedEngine([vocabulary().encode(" upon a time 🎉")]))
    assert cli.main(["generate", "x", "--prompt", "Once"]) == 0
    assert capsys.readouterr().out == " upon a time 🎉\n"
    assert list(engine.requests[0].token_ids) == vocabulary().encode("Once")


@pytest.mark.parametrize("text", ["[5, 6,\n 7]", "5 6\n7\n"])
def test_generate_reads_token_ids(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = use(monkeypatch, ScriptedEngine([(1,)]))
    file = tmp_path / "ids"
    file.write_text(text, encoding="utf-8")
    assert cli.main(["generate", "x", "--tokens", str(file)]) == 0
    assert engine.requests[0].token_ids == (5, 6, 7)
    engine = use(monkeypatch, ScriptedEngine([(1,)]))
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert cli.main(["generate", "x", "--tokens", "-"]) == 0
    assert engine.requests[0].token_ids == (5, 6, 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no token"),
        ("[]", "holds no token"),
        ("[1, true]", "holds true"),
        ("[1.5]", "holds 1.5"),
        ("[1", "is none"),
        ("1 two", "holds 'two'"),
        ("201088", "201,088 is outside the vocabulary (0 to 201,087)"),
        ("-1", "-1 is outside"),
        ("1" * 5000, "holds '1111"),
    ],
)
def test_generate_names_what_is_no_token_id(
    text: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use(monkeypatch, ScriptedEngine([(1,)]))
    file = tmp_path / "ids"
    file.write_text(text, encoding="utf-8")
    assert cli.main(["generate", "x", "--tokens", str(file)]) == 2
    assert expected in capsys.readouterr().err


def test_generate_file_that_is_not_text_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, ScriptedEngine([(1,)]))
    file = tmp_path / "ids"
    file.write_bytes(b"\xff\xfe")
    assert cli.main(["generate", "x", "--tokens", str(file)]) == 2
    assert "is not UTF-8 text: byte 0 is 0xff" in capsys.readouterr().err


def test_generate_json_has_logprobs_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = [Token(64, -0.25, ((64, -0.25), (65, -2.0)))]
    use(monkeypatch, ScriptedEngine([script]))
    assert cli.main(["generate", "x", "--prompt", "a", "--json", "--logprobs", "2"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["logprobs"][0]["logprob"] == -0.25
    assert [entry["token_id"] for entry in record["logprobs"][0]["top_logprobs"]] == [64, 65]
    use(monkeypatch, ScriptedEngine([script]))
    assert cli.main(["generate", "x", "--prompt", "a", "--json"]) == 0
    assert "logprobs" not in json.loads(capsys.readouterr().out)


def test_interrupt_is_exit_code_130_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(path: Path, config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load_engine", interrupted)
    assert cli.main(["chat", "x", "Hello"]) == 130
    assert capsys.readouterr() == ("", "")


def test_tiny_is_made_once_and_says_that_it_is_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_tiny_checkpoint(tmp_path / "tiny", vocabulary_size=512)
    monkeypatch.setattr(loading, "tiny_checkpoint_path", lambda: made)
    assert cli.main(["inspect", "tiny", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["model"]["path"] == str(made)
    assert "random" in err
    assert "gibberish" in err


def test_inspect_says_what_would_run_and_why(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(model), "--threads", "1", "--context-length", "256"]) == 0
    text = capsys.readouterr().out
    assert "(asked for: 1)" not in text  # the reason is the reason, the number stands before it
    for expected in (
        "6: 3 full, 3 with a window of 8",
        "256 tokens",
        "paged attention",
        "tokens a second for one answer",
        "total",
    ):
        assert expected in text


def test_inspect_says_what_computes_attention_and_why(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(model)]) == 0
    assert "\nattention    native (our paged attention; sinks and windows" in capsys.readouterr().out
    assert cli.main(["inspect", str(model), "--attention", "sdpa"]) == 2
    assert "attention is 'sdpa' and engine is 'native'; expected 'auto'" in capsys.readouterr().err
    pytest.importorskip("torch", reason="the extra [torch] is not installed")
    torch = ["inspect", str(model), "--engine", "torch", "--device", "cpu", "--attention"]
    assert cli.main([*torch, "sdpa"]) == 0
    text = capsys.readouterr().out
    assert "\nattention    sdpa on cpu, float32 (asked for; sinks as one more key without a value)" in text
    assert "float32, PyTorch; experts mxfp4" in text and "tokens; keys and values float32" in text
    assert "speed      not looked at" in text  # the figures would be those of other kernels
    assert cli.main([*torch, "flash3", "--json"]) == 2
    assert "attention is 'flash3', which needs a device of kind cuda" in capsys.readouterr().err


def test_inspect_json_adds_up(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(model), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    parts = {name: size for name, size in record["memory"].items() if name.endswith("_bytes")}
    total, _ = parts.pop("total_bytes"), parts.pop("limit_bytes")
    assert sum(parts.values()) == total
    assert record["fits"] is True
    assert record["model"]["parameters"] > record["model"]["active_parameters"] > 0


def test_inspect_of_what_does_not_fit_shows_the_refused_plan(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(model), "--memory-limit", "1MB", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["fits"] is False
    assert f"{record['memory']['total_bytes'] / 1e9:.2f} GB" in record["refusal"]
    assert record["memory"]["limit_bytes"] == 10**6


@pytest.mark.parametrize(
    ("text", "expected"),
    [("14GiB", 14 * 2**30), ("1.5g", 1_500_000_000), ("900MB", 900_000_000), ("123", 123), ("2KiB", 2048)],
)
def test_sizes_are_bytes(text: str, expected: int) -> None:
    assert options.memory_bytes(text) == expected


def test_final_without_reasoning_prints_no_blank_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, ScriptedEngine([gen(FINAL.format("yes"))]))
    assert cli.main(["chat", "x", "Hello", "--show-reasoning"]) == 0
    assert capsys.readouterr() == ("yes\n", "")


def test_generate_runs_a_real_checkpoint_the_same_with_one_thread_and_two(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ids"
    file.write_text("1 2 3 4 5", encoding="utf-8")
    found = []
    for threads in ("1", "2"):
        words = ["--tokens", str(file), "--max-tokens", "8", "--temperature", "0", "--threads", threads]
        assert cli.main(["generate", str(model), *words, "--json", "--logprobs", "1"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["token_ids"] == found[1]["token_ids"]
    assert len(found[0]["token_ids"]) == 8
    assert found[0]["finish_reason"] == "length"
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in found[0]["logprobs"])


def test_settings_of_the_options_reach_the_engine() -> None:
    words = (
        "--weights bf16 --threads 3 --context-length 99 --isa scalar --max-batch-tokens 7 --max-sequences 2"
    )
    arguments = options.parse(["inspect", "x", *words.split(), "--memory-limit", "1GB"])
    assert options.engine_config(arguments) == EngineConfig(
        weights="bf16",
        threads=3,
        context_length=99,
        isa="scalar",
        max_batch_tokens=7,
        max_sequences=2,
        memory_limit_bytes=10**9,
    )


@pytest.mark.parametrize(
    ("words", "model", "question"),
    [
        (["What is 47 + 385?"], "demo", "What is 47 + 385?"),
        (["Hello?"], "demo", "Hello?"),
        (["-"], "demo", "-"),
        (["tiny"], "tiny", None),
        (["demo"], "demo", None),
        (["models/gpt-oss-20b"], "models/gpt-oss-20b", None),
        (["tiny", "Who are you?"], "tiny", "Who are you?"),
        (["a" * 5000 + "?"], "demo", "a" * 5000 + "?"),
        (["\0 ?"], "demo", "\0 ?"),
        ([], "demo", None),
    ],
)
def test_the_only_word_of_chat_is_a_question_unless_it_is_a_model(
    words: list[str], model: str, question: str | None
) -> None:
    arguments = options.parse(["chat", *words])
    assert (arguments.model, arguments.question) == (model, question)


@pytest.mark.parametrize(
    "words",
    [
        ["tiny", "Who are you?", "--max-tokens", "5", "--json"],
        ["tiny", "--max-tokens", "5", "--json", "Who are you?"],
        ["--max-tokens", "5", "tiny", "--json", "Who are you?"],
        ["--json", "--max-tokens", "5", "tiny", "Who are you?"],
    ],
)
def test_question_is_found_before_behind_and_between_options(words: list[str]) -> None:
    arguments = options.parse(["chat", *words])
    assert (arguments.model, arguments.question) == ("tiny", "Who are you?")
    assert (arguments.max_tokens, arguments.json) == (5, True)


@pytest.mark.parametrize("question", ["-", "- 5 + 3?", "Hello"])
def test_question_behind_an_adapter_may_be_any_text(question: str) -> None:
    arguments = options.parse(["chat", "tiny", "--lora", "a=adapters/a", question])
    assert (arguments.model, arguments.question) == ("tiny", question)


@pytest.mark.parametrize("words", [["tiny", "--json", "one", "two"], ["tiny", "one", "--json", "two"]])
def test_second_question_is_one_word_too_many(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="one word too many"):
        options.parse(["chat", *words])


def test_a_folder_with_blanks_in_its_name_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my model").mkdir()
    assert options.parse(["chat", "my model"]).model == "my model"


@pytest.mark.parametrize("command", ["inspect", "bench", "generate"])
def test_the_demo_model_is_meant_where_none_is_given(command: str) -> None:
    words = [command, "--prompt", "x"] if command == "generate" else [command]
    assert options.parse(words).model == "demo"
