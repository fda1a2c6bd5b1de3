"""Laws of the Messages API that hold for any body and for any tokens."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from harmonium.engine import ScriptedEngine
from harmonium.harmony.vocabulary import SPECIAL_TOKENS
from harmonium.server import ServerConfig, ServerState
from tests.scripted_chat import gen
from tests.server.client import make_state, with_client
from tests.server.messages_client import WEATHER, events_of, fold, message_of, tool, without_ids

ANSWER = "<|channel|>final<|message|>x<|return|>"
CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": [1, "b\\u00e9"]}<|call|>'
BODY: dict[str, Any] = {
    "model": "scripted",
    "max_tokens": 300,
    "system": [{"type": "text", "text": "Be brief", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "look", "signature": "s"},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "Oslo"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "22", "is_error": False},
                {"type": "text", "text": "And now?"},
            ],
        },
    ],
    "tools": [WEATHER, tool("f", strict=True, input_examples=[{}])],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 200, "display": "omitted"},
    "output_config": {
        "effort": "low",
        "format": {"type": "json_schema", "schema": {"type": "object", "properties": {}}},
    },
    "stop_sequences": ["zzz"],
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "metadata": {"user_id": "u"},
    "stream": False,
}
JUNK: list[Any] = [
    None, True, 0, -1, 1.5, 10**30, "", "x", "any", "\ud7ff\u0000<|end|>", [], [[]], {}, {"type": "x"}, [{}],
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def mutated(chooser: random.Random) -> dict[str, Any]:
    body = copy.deepcopy(BODY)
    for _ in range(chooser.choice([1, 1, 2])):
        *above, last = chooser.choice(list(places(body)))
        inner: Any = body
        for key in above:
            inner = inner[key]
        if isinstance(inner, dict) and chooser.random() < 0.2:
            del inner[last]
        else:
            inner[last] = chooser.choice(JUNK)
    return body


def test_no_body_makes_the_server_fail() -> None:
    state, chooser = make_state(ANSWER), random.Random(4)

    async def run(client: httpx.AsyncClient) -> dict[int, int]:
        counts: dict[int, int] = {}
        for _ in range(150):
            body = mutated(chooser)
            path = "/v1/messages" + chooser.choice(["", "", "/count_tokens"])
            response = await client.post(path, json=body)
            counts[response.status_code] = counts.get(response.status_code, 0) + 1
            assert response.status_code in (200, 400, 404), (response.text, body)
            if response.status_code != 200:
                assert response.json()["type"] == "error"
        return counts

    counts = with_client(state, run)
    assert counts[200] > 10 and counts[400] > 30
    assert state.num_held == 0


def tokens(chooser: random.Random) -> list[int]:
    """A turn with some of its tokens changed, taken out or doubled."""
    found = [
        *gen(chooser.choice([CALL, ANSWER, "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"]))
    ]
    found += gen(chooser.choice([CALL, ANSWER]))
    for _ in range(chooser.randrange(4)):
        place = chooser.randrange(len(found))
        match chooser.randrange(3):
            case 0:
                found[place] = chooser.choice([*SPECIAL_TOKENS, *gen(' "}{]\\,')])
            case 1:
                del found[place]
            case _:
                found.insert(place, found[place])
    return found


@pytest.mark.parametrize("seed", range(4))
def test_any_tokens_give_the_same_streamed_as_whole(seed: int) -> None:
    chooser = random.Random(seed)
    body = {**BODY, "thinking": {"type": "adaptive"}, "stop_sequences": ["22"]}
    for _ in range(12):
        script = tokens(chooser)
        engine = ScriptedEngine([script], tokens_per_event=chooser.choice([1, 2, 5]))
        state = ServerState(ServerConfig(), engine)

        async def run(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response]:
            whole = await client.post("/v1/messages", json=body)
            return whole, await client.post("/v1/messages", json={**body, "stream": True})

        whole, streamed = with_client(state, run)
        # The server is one, so signatures are the same too.
        assert without_ids(fold(events_of(streamed))) == without_ids(message_of(whole)), script
        json.dumps(whole.json(), allow_nan=False)
        assert state.num_held == 0
