"""langchain-openai: tools, streams and structured output, on both APIs."""

from __future__ import annotations

from typing import Any

import pytest

langchain_openai = pytest.importorskip(
    "langchain_openai", reason="langchain-openai is not installed: tests/clients/install"
)

import pydantic  # noqa: E402
from langchain_core.messages import HumanMessage, ToolMessage  # noqa: E402
from langchain_core.tools import tool  # noqa: E402

from tests.clients.scripts import ANSWER, KEY, REASONED, WEATHER, final, keyed_state  # noqa: E402
from tests.server.client import prompt_text  # noqa: E402
from tests.server.live import served  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # other people's code

BOTH = pytest.mark.parametrize("uses_responses", [False, True])


@tool
def get_weather(city: str) -> str:
    """Weather of a city."""
    assert city == "Oslo"
    return "22 degrees"


class Party(pydantic.BaseModel):
    """A party."""

    name: str
    guests: list[str]


def chat_model(url: str, uses_responses: bool) -> Any:
    return langchain_openai.ChatOpenAI(
        model="scripted",
        base_url=f"{url}/v1",
        api_key=KEY,
        use_responses_api=uses_responses,
        max_retries=0,
    )


@BOTH
def test_tool_loop_ends_in_an_answer(uses_responses: bool) -> None:
    state = keyed_state(WEATHER, ANSWER)
    with served(state) as url:
        model = chat_model(url, uses_responses).bind_tools([get_weather])
        messages: list[Any] = [HumanMessage("Weather in Oslo?")]
        first = model.invoke(messages)
        (asked,) = first.tool_calls
        assert (asked["name"], asked["args"]) == ("get_weather", {"city": "Oslo"})
        result = get_weather.invoke(asked["args"])
        messages += [first, ToolMessage(result, tool_call_id=asked["id"])]
        second = model.invoke(messages)
    assert second.text == "It is 22 degrees in Oslo."
    text = prompt_text(state)
    assert text.index('{"city": "Oslo"}') < text.index("22 degrees")
    assert second.usage_metadata["output_tokens"] > 0


@BOTH
def test_stream_adds_up_to_the_answer(uses_responses: bool) -> None:
    with served(keyed_state(REASONED)) as url:
        model = chat_model(url, uses_responses)
        chunks = list(model.stream("Hello"))
        whole = model.invoke("Hello")
    assert "".join(chunk.text for chunk in chunks) == "Hi there" == whole.text


@BOTH
def test_structured_output_is_a_pydantic_object(uses_responses: bool) -> None:
    party = Party(name="Midsummer", guests=["Ada", "Bo"])
    with served(keyed_state(final(party.model_dump_json(), constrained=True))) as url:
        model = chat_model(url, uses_responses).with_structured_output(Party, method="json_schema")
        assert model.invoke("Plan a party.") == party
