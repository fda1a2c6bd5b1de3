"""The Messages API over a real engine with random weights: what the grammar promises holds."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx

from harmonium.testing import make_tiny_checkpoint
from tests.server.client import HELLO
from tests.server.messages_client import events_of, fold, message_of, without_ids
from tests.server.test_tiny_model import serving

UNIT = {
    "name": "get_weather",
    "strict": True,
    "input_schema": {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}},
        "required": ["unit"],
        "additionalProperties": False,
    },
}


def test_real_engine_keeps_to_what_a_message_asks_for(tmp_path: Path) -> None:
    model = make_tiny_checkpoint(tmp_path / "tiny")

    async def run() -> None:
        async with serving(model) as (client, _):
            await _check_same_streamed_and_whole(client)
            await _check_calls(client)
            await _check_thinking(client)
            await _check_answer_format(client)

    asyncio.run(run())


async def _send(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 60, "temperature": 0.0, **fields}
    return await client.post("/v1/messages", json=body)


async def _check_same_streamed_and_whole(client: httpx.AsyncClient) -> None:
    fields: dict[str, Any] = {"thinking": {"type": "adaptive"}}
    whole = message_of(await _send(client, **fields))
    streamed = fold(events_of(await _send(client, **fields, stream=True)))
    first, second = whole["usage"], streamed["usage"]
    prompt = ("input_tokens", "cache_read_input_tokens")
    assert sum(first[name] for name in prompt) == sum(second[name] for name in prompt)
    assert second["cache_read_input_tokens"] > 0
    assert without_ids({**streamed, "usage": first}) == without_ids(whole)
    count = {"model": "tiny", "messages": HELLO, "thinking": {"type": "adaptive"}}
    counted = (await client.post("/v1/messages/count_tokens", json=count)).json()
    assert counted == {"input_tokens": sum(first[name] for name in prompt)}


async def _check_calls(client: httpx.AsyncClient) -> None:
    fields: dict[str, Any] = {"tools": [UNIT], "thinking": {"type": "disabled"}}
    """A turn never ends without its call; a preamble of gibberish may leave no room for it."""
    for number in range(6):
        choice = ({"type": "any"}, {"type": "tool", "name": "get_weather"})[number % 2]
        asked = [{"role": "user", "content": f"Question {number}"}]
        answer = await _send(client, **fields, tool_choice=choice, messages=asked, temperature=1.0)
        message = message_of(answer)
        if message["stop_reason"] == "tool_use":
            call = message["content"][-1]
            assert call["name"] == "get_weather" and call["input"] in ({"unit": "C"}, {"unit": "F"})
        else:
            assert message["stop_reason"] == "max_tokens"
    none = message_of(await _send(client, **fields, tool_choice={"type": "none"}))
    assert [block["type"] for block in none["content"]] in ([], ["text"])


async def _check_thinking(client: httpx.AsyncClient) -> None:
    for thinking, most in (({"type": "disabled"}, 0), ({"type": "enabled", "budget_tokens": 5}, 5)):
        for temperature in (0.0, 1.5):
            usage = message_of(await _send(client, thinking=thinking, temperature=temperature))["usage"]
            assert usage["output_tokens_details"]["thinking_tokens"] <= most


async def _check_answer_format(client: httpx.AsyncClient) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    config = {"format": {"type": "json_schema", "schema": schema}}
    thinking = {"type": "disabled"}
    message = message_of(await _send(client, output_config=config, thinking=thinking))
    assert message["content"][0]["text"].split() and message["stop_reason"] == "end_turn"
    assert "".join(message["content"][0]["text"].split()) in ('{"a":true}', '{"a":false}')
