"""Objects and events against the models of the Open Responses specification (openresponses-types)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.client import call, make_state
from tests.server.responses_client import PATH, events_of, function, respond

spec: Any = pytest.importorskip(
    "openresponses_types.types", reason="openresponses-types is not installed: tests/clients/install"
)

TEXT = (
    "<|channel|>analysis<|message|>R<|end|><|start|>assistant<|channel|>commentary<|message|>Let me look."
    "<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
)
FINAL = "<|channel|>analysis<|message|>R<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>"


def _models() -> dict[str, Any]:
    """Type of an event -> its model."""
    found = {}
    for name in dir(spec):
        if name.endswith("StreamingEvent"):
            kind = getattr(spec, name).model_fields["type"].annotation
            found[next(iter(kind)).value] = getattr(spec, name)
    return found


@pytest.mark.parametrize("text", [TEXT, FINAL])
def test_response_is_a_response_resource(text: str) -> None:
    for fields in ({}, {"max_output_tokens": 3}, {"metadata": {"a": "b"}, "reasoning": {"effort": "low"}}):
        spec.ResponseResource.model_validate(respond(make_state(text), tools=[function("f")], **fields))


@pytest.mark.parametrize("text", [TEXT, FINAL])
def test_every_event_is_one_of_the_specification(text: str) -> None:
    models = _models()
    answer = call(
        make_state(text),
        "POST",
        PATH,
        json={"input": "Hello", "stream": True, "tools": [function("f")]},
        headers={"x-harmonium-events": "open-responses"},
    )
    text_of = answer.text.removesuffix("data: [DONE]\n\n")
    assert text_of != answer.text
    kinds = set()
    for event in events_of(text_of):
        models[event["type"]].model_validate(event)
        kinds.add(event["type"])
    assert "response.reasoning.delta" in kinds
