"""Whatever tokens a model writes, the API answers, and a stream adds up to the answer in one piece."""

from __future__ import annotations

from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harmonium.engine import ScriptedEngine
from harmonium.harmony.vocabulary import vocabulary
from harmonium.server import ServerConfig, ServerState
from tests.server.chat_stream import fold
from tests.server.client import HELLO, chunks_of, with_client

WORDS = ("assistant", "analysis", "final", "commentary", " to=functions.f", " json", "{}", "hi", " 🙂", "\n")
PIECES = [*([token] for token in (200002, 200003, 200005, 200006, 200007, 200008, 200012, 199999, 200013)),
          *(vocabulary().encode(word) for word in WORDS), [172], [251]]  # fmt: skip
STREAMS = st.lists(st.sampled_from(PIECES), max_size=25).map(
    lambda parts: [id_ for part in parts for id_ in part]
)
TOOLS = [{"type": "function", "function": {"name": "f"}}]
PATH = "/v1/chat/completions"


def without_call_ids(choice: dict[str, Any]) -> dict[str, Any]:
    for call in choice["message"].get("tool_calls", []):
        del call["id"]
    return choice


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STREAMS, st.integers(1, 7), st.booleans(), st.sampled_from([None, ["i"], ["assistant", "x"]]))
def test_any_tokens_give_200_and_the_same_streamed_as_whole(
    tokens: list[int], size: int, has_tools: bool, stop: list[str] | None
) -> None:
    state = ServerState(ServerConfig(), ScriptedEngine([tokens], tokens_per_event=size))
    body: dict[str, Any] = {"messages": HELLO, "return_token_ids": True, "logprobs": True}
    if has_tools:
        body["tools"] = TOOLS
    if stop is not None:
        body["stop"] = stop

    async def work(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response]:
        options = {"stream_options": {"include_usage": True}}
        return await client.post(PATH, json=body), await client.post(
            PATH, json={**body, "stream": True, **options}
        )

    whole, streamed = with_client(state, work)
    assert whole.status_code == 200, whole.text
    answer = whole.json()
    choice, usage = fold(chunks_of(streamed))
    if choice["logprobs"] is None:
        choice["logprobs"] = {"content": [], "refusal": None}
    assert without_call_ids(choice) == without_call_ids(answer["choices"][0])
    assert usage == answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert state.num_held == 0
