"""The interactive chat, typed at through a pipe, through prompt_toolkit's test input, and on a real
terminal.
"""

from __future__ import annotations

import asyncio
import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

import harmonium
from harmonium.chat_session import ChatSession
from harmonium.engine.protocol import EngineInfo
from harmonium.engine.scripted import Script, ScriptedEngine
from harmonium.harmony.render import render_prompt
from harmonium.harmony.vocabulary import vocabulary
from harmonium.input_line import LineSource, TerminalSource
from harmonium.interactive import Interactive, answer
from harmonium.model.batch import SamplingParams
from harmonium.screen import Screen
from tests.scripted_chat import FINAL, REASONED, gen

_PACKAGE_PARENT = str(Path(harmonium.__file__).parent.parent)
"""Where a child finds the package that is tested here, installed or not."""


def talk(
    typed: str, engine: ScriptedEngine, is_terminal: bool = False, session: ChatSession | None = None
) -> str:
    """What is written when these lines come through a pipe."""
    out = io.StringIO()
    session = session or ChatSession(SamplingParams())
    Interactive(engine, session, Screen(out, is_terminal), LineSource(io.StringIO(typed))).run()
    return out.getvalue()


def prompts(engine: ScriptedEngine) -> list[str]:
    return [vocabulary().decode(request.token_ids) for request in engine.requests]


def test_each_line_is_answered_in_one_conversation() -> None:
    engine = ScriptedEngine([gen(REASONED), gen(FINAL.format("Bye"))])
    written = talk("Hello\n\nSee you\n", engine)
    assert "Hi there\n" in written
    assert "Bye\n" in written
    assert "think hard" not in written
    assert "Hi there" in prompts(engine)[1]
    assert len(engine.requests) == 2


def test_tokens_and_context_are_told_after_each_answer() -> None:
    engine = ScriptedEngine([gen(REASONED)], seconds_per_event=0.002)
    written = talk("Hello\n", engine)
    total = len(engine.requests[0].token_ids) + len(gen(REASONED))
    expected = (
        rf"{len(gen(REASONED))} tokens, \d+\.\d tokens/s, first after \d+\.\d s, context {total} of 131,072"
    )
    assert re.search(expected, written)


def test_commands_cost_no_request_and_mistakes_one_line() -> None:
    engine = ScriptedEngine([gen(REASONED)])
    written = talk("/hlp\n/effort huge\n/effort low\n/quit\nHello\n", engine)
    assert engine.requests == []
    assert written.splitlines() == [
        "no command /hlp; did you mean /help? (/help lists them)",
        "reasoning effort is 'huge'; expected one of low, medium, high",
        "reasoning effort is low",
    ]


def test_blank_before_the_slash_sends_it() -> None:
    engine = ScriptedEngine([gen(REASONED)])
    talk(" /etc is a folder\n", engine)
    assert "<|message|>/etc is a folder<|end|>" in prompts(engine)[0]


def test_backslash_joins_lines_of_a_pipe() -> None:
    engine = ScriptedEngine([gen(REASONED)])
    talk("one\\\ntwo\\\nthree\n", engine)
    assert "<|message|>one\ntwo\nthree<|end|>" in prompts(engine)[0]


def test_reasoning_is_folded_to_one_line_on_a_terminal() -> None:
    written = talk("Hello\n", ScriptedEngine([gen(REASONED)]), is_terminal=True)
    assert re.search(r"▸ reasoning, 2 tokens, \d+\.\d s", written)
    assert "think" in written  # it was shown while it came
    assert "\x1b[1A\r\x1b[0J" in written  # and taken away


def test_reasoning_is_shown_in_full_when_asked_for() -> None:
    written = talk("/reasoning\nHello\n/reasoning\n", ScriptedEngine([gen(REASONED)]), is_terminal=True)
    assert "▸ reasoning" not in written
    assert "\x1b[2m hard\x1b[0m" in written
    assert "reasoning is folded" in written


def test_full_context_says_what_to_do_and_keeps_the_conversation() -> None:
    info = EngineInfo("m", 70, 201_088, engine="scripted")
    session = ChatSession(SamplingParams())
    written = talk("word " * 80 + "\n", ScriptedEngine([gen(REASONED)], info=info), session=session)
    assert "the context is full: prompt has" in written
    assert "/clear" in written
    assert session.messages == ()


def test_answer_that_fills_the_context_says_so() -> None:
    probe = ScriptedEngine([gen(REASONED)])
    talk("Hello\n", probe)
    room = len(probe.requests[0].token_ids) + 12
    engine = ScriptedEngine([gen(REASONED)], info=EngineInfo("m", room, 201_088, engine="scripted"))
    assert "cut off: the context is full (/save" in talk("Hello\n", engine)


def test_max_tokens_says_so() -> None:
    session = ChatSession(SamplingParams(max_tokens=12))
    written = talk("Hello\n", ScriptedEngine([gen(REASONED)]), session=session)
    assert "cut off at --max-tokens" in written


def test_engine_failure_is_one_line_and_the_chat_goes_on() -> None:
    failing = Script(gen("<|channel|>final<|message|>ha"), error="out of blocks")
    engine = ScriptedEngine([failing, Script(gen(FINAL.format("fine")))])
    written = talk("Hello\nAgain\n", engine)
    assert "out of blocks\n" in written
    assert "fine\n" in written
    assert "Hello" not in prompts(engine)[1]


def test_malformed_output_is_told_and_does_not_end_the_chat() -> None:
    written = talk("Hello\n", ScriptedEngine([gen("<|channel|>analysis<|return|>")]))
    assert "malformed output (incomplete_header)" in written


def test_engine_is_closed_at_the_end() -> None:
    engine = ScriptedEngine([gen(REASONED)])
    talk("Hello\n", engine)
    with pytest.raises(Exception, match="closed"):
        engine.admit(engine.requests[0])


def test_stopped_answer_stays_in_the_history_as_far_as_it_came() -> None:
    engine = ScriptedEngine([gen(FINAL.format("word " * 1000))], seconds_per_event=0.001)
    session = ChatSession(SamplingParams())
    out = io.StringIO()

    async def stop_in_the_middle() -> None:
        task = asyncio.create_task(answer(engine, session, "Hello", Screen(out)))
        while out.getvalue().count("word") < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        await task

    asyncio.run(stop_in_the_middle())
    assert engine.finished == ["aborted"]
    assert engine.running == 0
    assert "stopped, " in out.getvalue()
    prompt = vocabulary().decode(render_prompt(session.request("Go on").conversation))
    assert re.search(r"<\|channel\|>final<\|message\|>(word ?)+<\|end\|><\|start\|>user", prompt)


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe:
        yield pipe


def typed(keyboard: PipeInput, keys: str) -> str:
    source = TerminalSource(lambda: None, InMemoryHistory(), keyboard, DummyOutput())
    keyboard.send_text(keys)
    return source.read()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("hi\r", "hi"),
        ("one\\\rtwo\r", "one\ntwo"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("\x1b[200~a\nb\x1b[201~\r", "a\nb"),
        ("hix\x7f\r", "hi"),
    ],
)
def test_enter_sends_and_other_line_ends_do_not(keyboard: PipeInput, keys: str, expected: str) -> None:
    assert typed(keyboard, keys) == expected


def test_control_d_on_an_empty_line_ends_the_input(keyboard: PipeInput) -> None:
    with pytest.raises(EOFError):
        typed(keyboard, "\x04")


def test_control_c_at_the_input_is_told_to_the_loop(keyboard: PipeInput) -> None:
    with pytest.raises(KeyboardInterrupt):
        typed(keyboard, "half a lin\x03")


def test_control_r_toggles_reasoning_at_the_input(keyboard: PipeInput) -> None:
    session = ChatSession(SamplingParams())
    source = TerminalSource(
        lambda: print(session.toggle_reasoning()), InMemoryHistory(), keyboard, DummyOutput()
    )
    keyboard.send_text("h\x12i\r")
    assert source.read() == "hi"
    assert session.shows_reasoning


_CHILD = """
import os, sys
os.close(os.open(os.ttyname(0), os.O_RDWR))  # a session leader takes the terminal that it opens
from harmonium import cli, loading
from harmonium.engine.scripted import ScriptedEngine
loading.load_engine = lambda path, config: ScriptedEngine({scripts}, seconds_per_event=0.002)
sys.exit(cli.main(["chat", "x"]))
"""


class Terminal:
    """A child process on a terminal of its own."""

    def __init__(self, cache: Path) -> None:
        self._master, slave = pty.openpty()
        environment = {
            **os.environ,
            "PYTHONPATH": _PACKAGE_PARENT,
            "XDG_CACHE_HOME": str(cache),
            "PROMPT_TOOLKIT_NO_CPR": "1",  # this terminal does not answer where its cursor is
            "TERM": "xterm",
        }
        scripts = [gen(FINAL.format("word " * 5000)), gen(REASONED)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD.format(scripts=scripts)],
            cwd=_PACKAGE_PARENT,
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, expected: str, seconds: float = 30.0) -> None:
        """Read until this was written, after what was waited for before."""
        deadline = time.monotonic() + seconds
        while expected not in self.seen:
            assert time.monotonic() < deadline, f"no {expected!r} in {self.seen[-2000:]!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                self.seen += os.read(self._master, 65536).decode("utf-8", errors="replace")
        self.seen = self.seen.split(expected, 1)[1]

    def wait_for_prompt(self) -> None:
        """Read until the input line is drawn: bracketed paste is on, then comes the mark."""
        self.wait_for("\x1b[?2004h")
        self.wait_for(">")

    def send(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    child = Terminal(tmp_path)
    yield child
    child.close()


def test_control_c_stops_the_answer_and_not_the_program(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for_prompt()
    terminal.send("Hello\r")
    terminal.wait_for("word word")
    terminal.send("\x03")
    terminal.wait_for("stopped, ")
    terminal.wait_for_prompt()
    terminal.send("half a line\x03")
    terminal.wait_for("Ctrl-D or /quit ends the chat")
    terminal.wait_for_prompt()
    terminal.send("And now?\r")
    terminal.wait_for("▸ reasoning, 2 tokens")
    terminal.wait_for("Hi there")
    terminal.wait_for("tokens/s")
    terminal.wait_for_prompt()
    terminal.send("\x04")
    assert terminal.process.wait(timeout=20) == 0
    assert "Traceback" not in terminal.seen
    history = (tmp_path / "harmonium" / "chat-history").read_text(encoding="utf-8")
    assert "+Hello" in history
    assert "+And now?" in history
