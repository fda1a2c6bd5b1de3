"""Laws of the stream, whatever the model writes and wherever it breaks off."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from harmonium.engine import ScriptedEngine
from harmonium.engine.scripted import Script
from harmonium.server import ServerConfig, ServerState
from harmonium.server.responses_input import prepare_response
from harmonium.server.responses_run import Responses
from harmonium.server.responses_schema import ResponsesRequest
from harmonium.server.store import ResponseStore
from tests.scripted_chat import gen
from tests.server.responses_client import check_events, function, without_ids

PIECES = [
    *("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>", "<|call|>", "<|return|>"),
    *("analysis", "final", "commentary", "assistant", " to=functions.f", " to=functions.note", " to=x.y"),
    *("json", "{}", '{"input": "x"}', "hello ", "é", "🎉", "\n", "<|endoftext|>"),
]
TOOLS = [function("f"), {"type": "custom", "name": "note"}]
STREAMS = st.lists(st.sampled_from(PIECES), max_size=25).map(lambda pieces: gen("".join(pieces)))


async def _events(script: Script, tokens_per_event: int) -> list[dict[str, Any]]:
    engine = ScriptedEngine([script], tokens_per_event=tokens_per_event)
    responses = Responses(ServerState(ServerConfig(), engine), ResponseStore())
    body = ResponsesRequest(input="Hello", tools=TOOLS, include=["reasoning.encrypted_content"])
    prepared = prepare_response(responses.state, responses.store, body, response_id="resp_1", created_at=1)
    events = [event async for event in responses.stream(prepared, await responses.open(prepared))]
    assert responses.store.body("resp_1") == events[-1]["response"]
    assert responses.state.num_running == 0
    responses.store.close()
    return events


@settings(max_examples=150, deadline=None)
@given(STREAMS, st.integers(1, 7), st.booleans())
def test_any_tokens_make_a_lawful_stream(tokens: tuple[int, ...], tokens_per_event: int, fails: bool) -> None:
    script = Script(tokens, error="it failed" if fails else None)
    events = asyncio.run(_events(script, tokens_per_event))
    check_events(events)
    one_by_one = asyncio.run(_events(script, 1))
    final, other = (_without_seals(events[-1]["response"]), _without_seals(one_by_one[-1]["response"]))
    assert final == other


def _without_seals(body: dict[str, Any]) -> dict[str, Any]:
    """Two stores have two keys."""
    output = [{**item, "encrypted_content": None} for item in body["output"]]
    return without_ids({**body, "output": output})
