"""Clients of Node, each driven by a small script: openai (npm) and the Vercel AI SDK."""

from __future__ import annotations

import pytest

from tests.clients.installed import run_node
from tests.clients.scripts import ANSWER, WEATHER, final, keyed_state
from tests.server.client import engine_of, prompt_text
from tests.server.live import served

PARTY = final('{"name":"Midsummer","guests":["Ada","Bo"]}', constrained=True)


def test_openai_npm_loops_with_tools_on_both_apis() -> None:
    state = keyed_state(WEATHER, ANSWER)
    with served(state) as url:
        found = run_node("openai_npm.mjs", url)
    text = "It is 22 degrees in Oslo."
    assert found["chat"] == {"arguments": {"city": "Oslo"}, "streamed": text, "text": text}
    responses = found["responses"]
    assert (responses["arguments"], responses["text"]) == ({"city": "Oslo"}, text)
    assert responses["kinds"][0] == "response.created"
    assert "response.function_call_arguments.delta" in responses["kinds"]
    assert found["error"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found"}
    assert "22 degrees" in prompt_text(state)


@pytest.mark.parametrize("provider", ["responses", "chat", "compatible"])
def test_ai_sdk_streams_text_with_tools_and_generates_objects(provider: str) -> None:
    state = keyed_state(WEATHER, ANSWER, PARTY)
    with served(state) as url:
        found = run_node("ai_sdk.mjs", url, provider)
    assert found["tools"]["problems"] == []
    assert found["tools"]["text"] == "It is 22 degrees in Oslo."
    assert found["tools"]["calls"] == [{"city": "Oslo"}]
    if provider == "compatible":  # the provider that knows the field reasoning_content
        assert found["tools"]["reasoning"] == "I need the tool."
    assert found["object"] == {"name": "Midsummer", "guests": ["Ada", "Bo"]}
    assert len(engine_of(state).requests) == 3
    assert "# Response Formats" in prompt_text(state)
