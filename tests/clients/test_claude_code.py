"""The real Claude Code against POST /v1/messages: it writes and edits files, resumes a session, tells errors.

`tests/clients/install FOLDER claude` fetches the program (186 MB); without it the tests are skipped. The
script's tokens are checked by the grammar of its own requests.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.installed import client_folder
from tests.clients.scripts import call, final
from tests.clients.serving import serve_script

pytestmark = pytest.mark.slow

QUIET = {
    "DISABLE_TELEMETRY": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
}
MODEL = "gpt-oss-20b"


class Session:
    """The program in a directory of its own, with its own home."""

    def __init__(self, program: Path, directory: Path) -> None:
        self.program = program
        self.home = directory / "home"
        self.work = directory / "work"
        self.home.mkdir()
        self.work.mkdir()

    def run(self, address: str, prompt: str, *options: str) -> list[dict[str, Any]]:
        """The messages that `claude -p` prints."""
        models = ("ANTHROPIC_MODEL", "ANTHROPIC_SMALL_FAST_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL")
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("ANTHROPIC", "CLAUDE"))
        }
        done = subprocess.run(
            [self.program, "-p", prompt, "--output-format", "stream-json", "--verbose", *options],
            cwd=self.work,
            env={
                **kept,
                **QUIET,
                **dict.fromkeys(models, MODEL),
                "HOME": str(self.home),
                "CLAUDE_CONFIG_DIR": str(self.home),
                "ANTHROPIC_BASE_URL": address,
                "ANTHROPIC_API_KEY": "sk-test-key",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert found and found[-1]["type"] == "result", done.stdout[-2000:] + done.stderr[-2000:]
        return found


@pytest.fixture
def session(tmp_path: Path) -> Session:
    program = client_folder("claude") / "package" / "claude"
    assert program.is_file(), "the package holds no program"
    return Session(program, tmp_path)


def tool_calls(found: list[dict[str, Any]]) -> list[str]:
    """Names of the tools that the assistant called."""
    blocks = [block for line in found if line["type"] == "assistant" for block in line["message"]["content"]]
    return [block["name"] for block in blocks if block["type"] == "tool_use"]


def test_file_is_written_and_edited(session: Session, tmp_path: Path) -> None:
    path = str(session.work / "made.txt")
    turns = [
        call("Write", {"file_path": path, "content": "one\ntwo\n"}),
        call("Edit", {"file_path": path, "old_string": "two", "new_string": '2 € "quoted"'}),
        final("Done."),
    ]
    with serve_script(tmp_path, [{"harmony": turn} for turn in turns]) as address:
        found = session.run(address, "Make a file.", "--allowedTools", "Write,Edit")
    assert tool_calls(found) == ["Write", "Edit"]
    assert (found[-1]["result"], found[-1]["is_error"]) == ("Done.", False)
    assert (session.work / "made.txt").read_text() == 'one\n2 € "quoted"\n'


def test_command_is_run_and_its_output_comes_back(session: Session, tmp_path: Path) -> None:
    turns = [call("Bash", {"command": "printf 'a<b>\\n'", "description": "Prints"}), final("Printed.")]
    with serve_script(tmp_path, [{"harmony": turn} for turn in turns]) as address:
        found = session.run(address, "Print.", "--allowedTools", "Bash")
    results = [line for line in found if line["type"] == "user"]
    assert "a<b>" in json.dumps(results)
    assert found[-1]["result"] == "Printed."


def test_session_goes_on_with_its_thinking_replayed(session: Session, tmp_path: Path) -> None:
    first = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant" + final("One.")
    with serve_script(tmp_path, [{"harmony": turn} for turn in (first, final("Two."))]) as address:
        assert session.run(address, "First.")[-1]["result"] == "One."
        assert session.run(address, "Second.", "--continue")[-1]["result"] == "Two."


def test_prompt_that_is_too_long_is_told(session: Session, tmp_path: Path) -> None:
    with serve_script(tmp_path, [{"harmony": final("x")}], "--context-length", "200") as address:
        found = session.run(address, "Answer.")
    assert found[-1]["is_error"]
    assert "too long" in found[-1]["result"].lower(), found[-1]
