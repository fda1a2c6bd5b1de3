"""The real Codex CLI against our Responses API: it runs commands, edits files, takes schemas and errors.

`tests/clients/install FOLDER codex` fetches the program (167 MB); without it the tests are skipped. The
script's tokens are checked by the grammar of Codex's own requests.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.installed import client_folder
from tests.clients.serving import serve_script

pytestmark = pytest.mark.slow

CONFIG = """
model = "gpt-oss-20b"
model_provider = "local"
model_context_window = 131072
{extra}
[model_providers.local]
name = "local"
base_url = "{address}/v1"
wire_api = "responses"
env_key = "LOCAL_KEY"
"""
THINK = "<|channel|>analysis<|message|>I need a tool.<|end|><|start|>assistant"
PATCH = "*** Begin Patch\n*** Add File: patched.txt\n+by patch\n*** End Patch"


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The model thinks and calls a function."""
    header = f"<|channel|>commentary to=functions.{name} <|constrain|>json"
    return {"harmony": f"{THINK}{header}<|message|>{json.dumps(arguments)}<|call|>"}


def final(text: str) -> dict[str, Any]:
    """The model answers."""
    return {"harmony": f"<|channel|>final<|message|>{text}<|return|>"}


class Session:
    """Codex in a directory of its own, with its own home. program: its executable."""

    def __init__(self, program: Path, directory: Path) -> None:
        self.program = program
        self.home = directory / "home"
        self.work = directory / "work"
        self.home.mkdir()
        self.work.mkdir()

    def run(self, address: str, prompt: str, *options: str, extra: str = "") -> list[dict[str, Any]]:
        """The events that `codex exec --json` prints."""
        return self._exec(address, extra, "-s", "danger-full-access", *options, prompt)

    def resume(self, address: str, prompt: str) -> list[dict[str, Any]]:
        """Go on with the last session."""
        return self._exec(address, "", "resume", "--last", prompt)

    def _exec(self, address: str, extra: str, *arguments: str) -> list[dict[str, Any]]:
        (self.home / "config.toml").write_text(CONFIG.format(address=address, extra=extra))
        done = subprocess.run(
            [self.program, "exec", "--json", "--skip-git-repo-check", *arguments],
            cwd=self.work,
            env={**os.environ, "CODEX_HOME": str(self.home), "LOCAL_KEY": "x"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert events, done.stderr
        return events

    def freeform_model(self) -> dict[str, Any]:
        """A model of Codex's own catalog that edits by apply_patch, under our name."""
        listed = subprocess.run(
            [self.program, "debug", "models"],
            env={**os.environ, "CODEX_HOME": str(self.home)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        model: dict[str, Any] = json.loads(listed.stdout)["models"][0]
        changes = {
            "slug": "gpt-oss-20b",
            "apply_patch_tool_type": "freeform",
            "use_responses_lite": False,
            "supports_search_tool": False,
            "tool_mode": None,
        }
        return {**model, **changes}


@pytest.fixture
def session(tmp_path: Path) -> Session:
    found = sorted(client_folder("codex").glob("package/vendor/*/bin/codex"))
    assert found, "the package holds no program"
    return Session(found[0], tmp_path)


def said(events: list[dict[str, Any]]) -> list[str]:
    """What the agent answered."""
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    return [item["text"] for item in items if item["type"] == "agent_message"]


def errors(events: list[dict[str, Any]]) -> str:
    return json.dumps(
        [event for event in events if "error" in event["type"] or event["type"] == "turn.failed"]
    )


def test_command_edits_a_file(session: Session, tmp_path: Path) -> None:
    write = call("exec_command", {"cmd": "printf 'by command' > made.txt"})
    with serve_script(tmp_path, [write, final("Done.")]) as address:
        events = session.run(address, "Make a file.")
    assert said(events) == ["Done."], events
    assert (session.work / "made.txt").read_text() == "by command"


def test_patch_is_applied_from_free_text(session: Session, tmp_path: Path) -> None:
    patch = {"harmony": f"{THINK}<|channel|>commentary to=functions.apply_patch<|message|>{PATCH}<|call|>"}
    catalog = tmp_path / "models.json"
    catalog.write_text(json.dumps({"models": [session.freeform_model()]}))
    with serve_script(tmp_path, [patch, final("Patched.")]) as address:
        events = session.run(address, "Patch.", extra=f'model_catalog_json = "{catalog}"')
    assert said(events) == ["Patched."], events
    assert (session.work / "patched.txt").read_text() == "by patch\n"


def test_answer_follows_an_output_schema(session: Session, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    fields = {"answer": {"type": "integer"}}
    schema.write_text(
        json.dumps(
            {"type": "object", "properties": fields, "required": ["answer"], "additionalProperties": False}
        )
    )
    with serve_script(tmp_path, [final('{"answer": 42}')]) as address:
        events = session.run(address, "Answer.", "--output-schema", str(schema))
    assert [json.loads(text) for text in said(events)] == [{"answer": 42}], events


def test_failure_in_the_middle_is_retried_and_told(session: Session, tmp_path: Path) -> None:
    broken = {"harmony": "<|channel|>final<|message|>half", "end": "error"}
    with serve_script(tmp_path, [broken, final("Whole.")]) as address:
        events = session.run(address, "Answer.")
    assert said(events)[-1:] == ["Whole."], events


def test_prompt_that_is_too_long_is_known_as_such(session: Session, tmp_path: Path) -> None:
    with serve_script(tmp_path, [final("x")], "--context-length", "100") as address:
        events = session.run(address, "Answer.")
    assert "ran out of room" in errors(events), events


def test_local_provider_probes_and_answers(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`codex --oss` asks for the models, then for one token after an empty text."""
    lines = [final("x"), final("Local."), final("Local.")]
    with serve_script(tmp_path, lines) as address:
        monkeypatch.setenv("CODEX_OSS_BASE_URL", f"{address}/v1")
        options = ("--oss", "--local-provider", "lmstudio", "-m", "gpt-oss-20b")
        events = session.run(address, "Answer.", *options)
    assert said(events) == ["Local."], events


def test_session_is_resumed_with_its_reasoning_replayed(session: Session, tmp_path: Path) -> None:
    first = {"harmony": f"{THINK}<|channel|>final<|message|>One.<|return|>"}
    with serve_script(tmp_path, [first, final("Two.")]) as address:
        assert said(session.run(address, "First.")) == ["One."]
        assert said(session.resume(address, "Second.")) == ["Two."]
