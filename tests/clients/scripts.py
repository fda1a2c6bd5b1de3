"""What the scripted model writes for the clients, and the tools that they offer it."""

from __future__ import annotations

import json
from typing import Any

from harmonium.engine import ScriptedEngine
from harmonium.server import ServerConfig, ServerState
from tests.scripted_chat import gen

KEY = "sk-test-key"

ANSWER = "<|channel|>final<|message|>It is 22 degrees in Oslo.<|return|>"
REASONED = (
    "<|channel|>analysis<|message|>They greet me.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Hi there<|return|>"
)


def call(name: str, arguments: object, thought: str = "I need the tool.") -> str:
    """A turn that thinks and calls a tool."""
    return (
        f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.{name} <|constrain|>json<|message|>{json.dumps(arguments, ensure_ascii=False)}<|call|>"
    )


def final(text: str, constrained: bool = False) -> str:
    """A turn that answers at once."""
    header = "final <|constrain|>json" if constrained else "final"
    return f"<|channel|>{header}<|message|>{text}<|return|>"


WEATHER = call("get_weather", {"city": "Oslo"})
WEATHER_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


def keyed_state(*scripts: str, **config: Any) -> ServerState:
    """A server that asks for KEY and writes these scripts in turn, starting again after the last."""
    engine = ScriptedEngine([gen(script) for script in scripts])
    return ServerState(ServerConfig(api_keys=(KEY,), **config), engine)
