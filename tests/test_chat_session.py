"""A conversation that grows: history, commands, files."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from harmonium.chat import complete_chat
from harmonium.chat_session import COMMANDS, HELP, ChatSession
from harmonium.engine.scripted import ScriptedEngine
from harmonium.errors import ConfigError, HarmonyError
from harmonium.harmony.render import render_prompt
from harmonium.harmony.vocabulary import vocabulary
from harmonium.model.batch import SamplingParams
from tests.scripted_chat import FINAL, REASONED, gen


def new_session() -> ChatSession:
    return ChatSession(SamplingParams(), current_date="2026-01-02")


def answered(session: ChatSession, question: str, output: str) -> None:
    engine = ScriptedEngine([gen(output)])
    session.record(question, asyncio.run(complete_chat(engine, session.request(question))))


def prompt_of(session: ChatSession, question: str) -> str:
    return vocabulary().decode(render_prompt(session.request(question).conversation))


def test_next_prompt_holds_the_answer_and_not_its_reasoning() -> None:
    session = new_session()
    answered(session, "Hello", REASONED)
    prompt = prompt_of(session, "And now?")
    assert (
        "<|start|>user<|message|>Hello<|end|><|start|>assistant<|channel|>final<|message|>Hi there<|end|>"
        in prompt
    )
    assert "think hard" not in prompt
    assert prompt.endswith("<|start|>user<|message|>And now?<|end|><|start|>assistant")
    assert "Current date: 2026-01-02" in prompt


def test_answer_that_was_cut_off_stays_in_the_history_closed() -> None:
    session = new_session()
    answered(session, "Hello", "<|channel|>final<|message|>Hal")
    assert "<|channel|>final<|message|>Hal<|end|><|start|>user" in prompt_of(session, "Go on")


def test_settings_reach_the_prompt() -> None:
    session = new_session()
    assert session.command("/effort high") == "reasoning effort is high"
    assert session.command("/system  Answer in French. ") == "instructions: Answer in French."
    assert session.command("/system") == "instructions: Answer in French."
    prompt = prompt_of(session, "x")
    assert "Reasoning: high" in prompt
    assert "# Instructions\n\nAnswer in French." in prompt


def test_clear_forgets_the_conversation_and_keeps_the_settings() -> None:
    session = new_session()
    session.command("/effort low")
    answered(session, "Hello", REASONED)
    session.command("/clear")
    prompt = prompt_of(session, "x")
    assert "Hello" not in prompt
    assert "Reasoning: low" in prompt


def test_reasoning_of_the_last_answer_can_be_unfolded() -> None:
    session = new_session()
    answered(session, "Hello", REASONED)
    assert session.command("/reasoning") == "think hard"
    assert session.shows_reasoning
    session.command("/reasoning")
    assert not session.shows_reasoning


def test_every_command_is_in_the_help() -> None:
    assert all(f"{command} " in HELP or command == "/help" for command in COMMANDS if command != "/quit")
    assert "/quit" in HELP


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/efort low", r"no command /efort; did you mean /effort\?"),
        ("/xyzzy", r"no command /xyzzy \(/help"),
        ("/save", "/save needs a file"),
        ("/save /no/such/folder/talk.json", "cannot be written"),
    ],
)
def test_mistaken_command_is_named(line: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        new_session().command(line)


def test_unknown_effort_is_named() -> None:
    session = new_session()
    with pytest.raises(HarmonyError, match="'huge'"):
        session.command("/effort huge")
    assert session.effort == "medium"


def test_saved_conversation_loads_to_the_same_prompt(tmp_path: Path) -> None:
    session = new_session()
    session.command("/system Be kind.")
    session.command("/effort low")
    answered(session, "Hello", REASONED)
    answered(session, "naïve 🎉 <|end|>", FINAL.format("two"))
    file = tmp_path / "talk.json"
    assert session.command(f"/save {file}") == f"saved to {file}"
    loaded = new_session()
    loaded.load(file)
    assert prompt_of(loaded, "Next") == prompt_of(session, "Next")
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_saved_conversation_is_a_chat_completions_body(tmp_path: Path) -> None:
    session = new_session()
    session.command("/system Be kind.")
    answered(session, "Hello", REASONED)
    session.command(f"/save {tmp_path / 'talk.json'}")
    assert json.loads((tmp_path / "talk.json").read_text(encoding="utf-8")) == {
        "reasoning_effort": "medium",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi there", "reasoning_content": "think hard"},
        ],
    }


def test_existing_file_is_replaced_only_when_told(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text("mine", encoding="utf-8")
    session = new_session()
    with pytest.raises(ConfigError, match=r"exists; /save! "):
        session.command(f"/save {file}")
    assert file.read_text(encoding="utf-8") == "mine"
    session.command(f"/save! {file}")
    assert json.loads(file.read_text(encoding="utf-8"))["messages"] == []


def test_options_win_over_the_file(tmp_path: Path) -> None:
    session = new_session()
    session.command("/system Be kind.")
    session.command(f"/save {tmp_path / 'talk.json'}")
    loaded = new_session()
    loaded.load(tmp_path / "talk.json", instructions="Be brief.", effort="high")
    assert (loaded.instructions, loaded.effort) == ("Be brief.", "high")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "is not JSON"),
        (b"[]", "no object with messages"),
        (b"\xff", "is not UTF-8"),
        (b'{"messages": 3}', "messages is 3"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "robot"),
        (b'{"messages": [], "reasoning_effort": 7}', "reasoning effort is 7"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_file_that_is_no_conversation_is_named(content: bytes, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_bytes(content)
    session = new_session()
    with pytest.raises(ConfigError, match=expected) as raised:
        session.load(file)
    assert str(file) in str(raised.value)
    assert session.messages == ()


@pytest.mark.parametrize("name", ["~no-such-user-at-all/x", "a\0b", "a" * 300])
def test_save_to_an_impossible_name_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        new_session().command(f"/save! {name}")
    assert list(tmp_path.iterdir()) == []
