"""Tool calls whose arguments are awkward, through openai-agents: both APIs, streamed and not.

The kinds are those of the compatibility test of openai/gpt-oss (no arguments, Markdown, other scripts, nested
numbers, optional fields, a single word); test_gpt_oss_suite.py runs that test itself where it is installed.
The script is checked by the grammar of the request, so the tool's schema must allow what is called.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import openai
import pytest

os.environ.setdefault("OPENAI_AGENTS_DISABLE_TRACING", "1")  # else it uploads traces
agents = pytest.importorskip("agents", reason="openai-agents is not installed: tests/clients/install")

from harmonium.engine import Script, ScriptedEngine  # noqa: E402
from harmonium.server import ServerConfig, ServerState  # noqa: E402
from tests.clients.scripts import ANSWER, KEY, call  # noqa: E402
from tests.scripted_chat import gen  # noqa: E402
from tests.server.client import engine_of  # noqa: E402
from tests.server.live import served  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # other people's code

TEXT = {"type": "string"}
NUMBERS = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
PLOT = {
    "points": NUMBERS,
    "kind": {"type": "string", "enum": ["bar", "line"]},
    "title": {**TEXT, "default": ""},
}
LOOKUP = {
    "table": TEXT,
    "columns": {"type": "array", "items": TEXT},
    "where": {**TEXT, "default": ""},
    "limit": {"type": "integer", "minimum": 1, "maximum": 500, "default": 20},
}
TOOLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "uptime": ({}, []),
    "render_markdown": ({"source": TEXT}, ["source"]),
    "guess_language": ({"text": TEXT}, ["text"]),
    "plot": (PLOT, ["points", "kind"]),
    "lookup": (LOOKUP, ["table", "columns"]),
    "forecast": ({"place": TEXT}, ["place"]),
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("uptime", {}),
    ("render_markdown", {"source": "## Plan\n\n- *first*\n- `second`\n\n> end"}),
    ("render_markdown", {"source": '```json\n{"a": "\\n"}\n```'}),
    ("guess_language", {"text": "¿Dónde está la biblioteca?"}),
    ("guess_language", {"text": "今日はいい天気ですね 🌸"}),
    ("guess_language", {"text": "Доброе утро — <|end|>"}),
    ("plot", {"points": [[0, 1], [1, -1.5], [2, 2.25e3]], "kind": "line"}),
    ("plot", {"points": [], "kind": "bar", "title": "Nothing 'yet'"}),
    ("lookup", {"table": "orders", "columns": ["id", "total"], "where": "state = 'sent'", "limit": 5}),
    ("lookup", {"table": "log", "columns": []}),
    ("forecast", {"place": "São Paulo"}),
    ("forecast", {"place": "10115"}),
]


def function_tool(name: str, seen: list[Any]) -> Any:
    """A tool of this name that notes its arguments."""
    properties, required = TOOLS[name]
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    async def invoke(_: Any, arguments: str) -> str:
        seen.append(json.loads(arguments))
        return '{"ok": true}'

    return agents.FunctionTool(
        name=name,
        description=f"Calls {name}.",
        params_json_schema=schema,
        on_invoke_tool=invoke,
        strict_json_schema=False,
    )


async def run_agent(url: str, api: str, is_streamed: bool, tool: Any) -> tuple[str, list[str]]:
    """What the agent answers, and the types of the raw events of a stream."""
    kind = agents.OpenAIResponsesModel if api == "responses" else agents.OpenAIChatCompletionsModel
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        agent = agents.Agent(name="Caller", tools=[tool], model=kind(model="scripted", openai_client=client))
        if not is_streamed:
            return (await agents.Runner.run(agent, "Call it.")).final_output, []
        result = agents.Runner.run_streamed(agent, "Call it.")
        events = [event async for event in result.stream_events()]
        raw = [event.data.type for event in events if event.type == "raw_response_event"]
        return result.final_output, raw


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("api", ["responses", "chat"])
@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_tool_gets_the_arguments_that_the_model_wrote(
    name: str, arguments: dict[str, Any], api: str, is_streamed: bool
) -> None:
    # A special token that is spelled in the arguments is text: written so that gen() takes it as such.
    written = call(name, arguments).replace('<|end|>"', '\\u003c|end|>"')
    scripts = [Script(gen(text), obeys_constraint=True) for text in (written, ANSWER)]
    state = ServerState(ServerConfig(api_keys=(KEY,)), ScriptedEngine(scripts))
    seen: list[Any] = []
    with served(state) as url:
        answer, raw = asyncio.run(run_agent(url, api, is_streamed, function_tool(name, seen)))
    assert (seen, answer) == ([arguments], "It is 22 degrees in Oslo.")
    assert len(engine_of(state).requests) == 2
    if is_streamed:
        assert raw.count("response.completed") == 2
        assert any("reasoning" in kind for kind in raw)
