"""openai-agents: a tool loop, a stream and a handoff, on both APIs."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import openai
import pytest

os.environ.setdefault("OPENAI_AGENTS_DISABLE_TRACING", "1")  # else it uploads traces
agents = pytest.importorskip("agents", reason="openai-agents is not installed: tests/clients/install")

from tests.clients.scripts import ANSWER, KEY, WEATHER, call, keyed_state  # noqa: E402
from tests.server.client import engine_of, prompt_text  # noqa: E402
from tests.server.live import served  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # other people's code

APIS = ["responses", "chat"]


def make_model(client: openai.AsyncOpenAI, api: str) -> Any:
    kind = agents.OpenAIResponsesModel if api == "responses" else agents.OpenAIChatCompletionsModel
    return kind(model="scripted", openai_client=client)


@agents.function_tool
def get_weather(city: str) -> str:
    """Weather of a city."""
    assert city == "Oslo"
    return "22 degrees"


def run(url: str, api: str, work: Any) -> Any:
    async def run_it() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            return await work(make_model(client, api))

    return asyncio.run(run_it())


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("is_streamed", [True, False])
def test_agent_calls_its_tool_and_answers(api: str, is_streamed: bool) -> None:
    state = keyed_state(WEATHER, ANSWER)

    async def work(model: Any) -> Any:
        agent = agents.Agent(
            name="Meteo",
            instructions="Be brief.",
            tools=[get_weather],
            model=model,
            model_settings=agents.ModelSettings(include_usage=True),  # else it asks no chat stream for usage
        )
        if not is_streamed:
            return await agents.Runner.run(agent, "Weather in Oslo?")
        result = agents.Runner.run_streamed(agent, "Weather in Oslo?")
        kinds = [event.type async for event in result.stream_events()]
        assert {"raw_response_event", "run_item_stream_event"} <= set(kinds)
        return result

    with served(state) as url:
        result = run(url, api, work)
    assert result.final_output == "It is 22 degrees in Oslo."
    kinds = [item.type for item in result.new_items]
    assert kinds.count("tool_call_item") == kinds.count("tool_call_output_item") == 1
    text = prompt_text(state)
    assert text.index("Be brief.") < text.index('{"city": "Oslo"}') < text.index("22 degrees")
    assert result.context_wrapper.usage.requests == 2
    assert result.context_wrapper.usage.output_tokens > 0


@pytest.mark.parametrize("api", APIS)
def test_agent_hands_over_to_another(api: str) -> None:
    state = keyed_state(call("transfer_to_meteo", {}), WEATHER, ANSWER)

    async def work(model: Any) -> Any:
        meteo = agents.Agent(name="Meteo", instructions="You know weather.", tools=[get_weather], model=model)
        triage = agents.Agent(name="Triage", instructions="Hand over.", handoffs=[meteo], model=model)
        return await agents.Runner.run(triage, "Weather in Oslo?")

    with served(state) as url:
        result = run(url, api, work)
    assert result.final_output == "It is 22 degrees in Oslo."
    assert result.last_agent.name == "Meteo"
    assert len(engine_of(state).requests) == 3
    assert "You know weather." in prompt_text(state) and "Hand over." not in prompt_text(state)
