"""What callers of the Python API may pass, turned into what the rooms below take."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from harmonium.chat import ChatRequest
from harmonium.config import EngineConfig, LoraSource, environment_config
from harmonium.errors import ConfigError, HarmonyError, RequestError
from harmonium.harmony.chat_history import messages_from_chat, tools_from_chat
from harmonium.harmony.grammar import TurnRules
from harmonium.harmony.grammar_request import read_answer_format, read_tool_choice
from harmonium.harmony.messages import Conversation, Message, Tool, builtin_tool, reasoning_effort
from harmonium.harmony.vocabulary import vocabulary
from harmonium.model.batch import SamplingParams

Prompt: TypeAlias = str | Sequence[int] | npt.NDArray[np.integer[Any]]
"""A text, which is encoded as ordinary text (no special token can come from it), or token ids."""

ChatMessages: TypeAlias = str | Sequence[Mapping[str, Any]] | Sequence[Message]
"""A user's text; or messages as the Chat Completions API has them; or Harmony's own."""


def engine_config(settings: Mapping[str, Any]) -> EngineConfig:
    """An EngineConfig of these settings over those of the environment over the defaults.

    Raises ConfigError for a setting that does not exist (with the nearest that does), or a value it cannot
    have.
    """
    known = [field.name for field in dataclasses.fields(EngineConfig)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"no setting {name!r}{hint} (there are {', '.join(known)})")
    merged: dict[str, Any] = {**environment_config(), **settings}
    if "lora" in merged:
        merged["lora"] = _adapters(merged["lora"])
    return EngineConfig(**merged)


def _adapters(given: object) -> tuple[LoraSource, ...]:
    """Names with folders, or sources as EngineConfig has them."""
    if isinstance(given, Mapping):
        wrong = next((path for path in given.values() if not isinstance(path, (str, os.PathLike))), None)
        if wrong is None and all(isinstance(name, str) for name in given):
            return tuple(LoraSource(name, Path(path)) for name, path in given.items())
    elif isinstance(given, (list, tuple)) and all(isinstance(source, LoraSource) for source in given):
        return tuple(given)
    raise ConfigError(f"lora is {given!r}; expected names with folders, such as {{'sql': 'adapters/sql'}}")


def chat_request(
    messages: ChatMessages,
    tools: Sequence[Mapping[str, Any] | Tool] | None,
    effort: str,
    instructions: str | None,
    builtin_tools: Sequence[str] | None,
    current_date: str | None,
    sampling: SamplingParams | None,
    *,
    response_format: object = None,
    rules: TurnRules | None = None,
    adapter: str | None = None,
) -> ChatRequest:
    """The request of `LLM.chat`. Raises HarmonyError for what cannot be expressed, RequestError."""
    if not isinstance(instructions, (str, NoneType)) or not isinstance(current_date, (str, NoneType)):
        raise HarmonyError("instructions and current_date are text or None")
    tools, builtin_tools = tools or (), builtin_tools or ()
    history, leading = _history(messages, builtin_tools)
    today = datetime.date.today().isoformat()
    conversation = Conversation(
        messages=history,
        instructions="\n\n".join(text for text in (instructions, leading) if text) or None,
        tools=_tools(tools),
        builtin_tools=tuple(builtin_tool(name) for name in builtin_tools),
        reasoning_effort=reasoning_effort(effort),
        current_date=today if current_date is None else current_date or None,
        response_format=read_answer_format(response_format)[1],
    )
    return ChatRequest(conversation, read_sampling(sampling), grammar=rules, adapter=adapter)


def turn_rules(response_format: object, choice: object, max_reasoning_tokens: int | None) -> TurnRules:
    """What the turn of `LLM.chat` has to keep to. Raises RequestError, naming the argument."""
    tool_choice, allowed_tools = read_tool_choice(choice)
    return TurnRules(
        tool_choice=tool_choice,
        allowed_tools=allowed_tools,
        answer=read_answer_format(response_format)[0],
        max_reasoning_tokens=max_reasoning_tokens,
    )


def read_sampling(sampling: SamplingParams | None) -> SamplingParams:
    """The settings, or the defaults for None. Raises RequestError for anything else."""
    if sampling is None:
        return SamplingParams()
    if not isinstance(sampling, SamplingParams):
        raise RequestError(f"sampling is a {type(sampling).__name__}; expected SamplingParams")
    return sampling


def _tools(tools: Sequence[Mapping[str, Any] | Tool]) -> tuple[Tool, ...]:
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes, bytearray)):
        raise HarmonyError(f"tools is a {type(tools).__name__}; expected a list of tools")
    # Those that are Tool already stand in for themselves by name, so that an error gives the right index.
    read = tools_from_chat([{"name": tool.name} if isinstance(tool, Tool) else tool for tool in tools])
    return tuple(
        given if isinstance(given, Tool) else found for given, found in zip(tools, read, strict=True)
    )


def _history(messages: ChatMessages, builtin_tools: Sequence[str]) -> tuple[tuple[Message, ...], str | None]:
    """Harmony messages, and the instructions that stood before them."""
    if isinstance(messages, str):
        return (Message("user", messages),), None
    if not isinstance(messages, Sequence) or isinstance(messages, (bytes, bytearray)):
        raise HarmonyError(f"messages is a {type(messages).__name__}; expected text or a list of messages")
    harmony = [message for message in messages if isinstance(message, Message)]
    if harmony and len(harmony) < len(messages):
        raise HarmonyError("messages mixes Message objects with dictionaries; expected one kind")
    if harmony:
        return tuple(harmony), None
    history = messages_from_chat(list(messages), builtin_tools)  # type: ignore[arg-type]
    return history.messages, history.instructions


def read_prompts(prompts: Prompt | Sequence[Prompt]) -> list[tuple[int, ...]]:
    """Token ids of one prompt or of many. Raises RequestError, naming which is neither text nor ids."""
    if isinstance(prompts, str) or _is_token_ids(prompts):
        return [read_token_ids(prompts, "prompts")]
    if not isinstance(prompts, Sequence) or isinstance(prompts, (bytes, bytearray)):
        raise RequestError(
            f"prompts is a {type(prompts).__name__}; expected text, token ids, or a list of them"
        )
    return [read_token_ids(prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts)]


def _is_token_ids(prompt: object) -> bool:
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 1
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(hasattr(x, "__index__") for x in prompt)


def read_token_ids(prompt: object, name: str) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return tuple(vocabulary().encode(prompt))
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise RequestError(f"{name} is a {type(prompt).__name__}; expected text or token ids")
    try:
        return tuple(operator.index(token_id) for token_id in prompt)
    except TypeError:
        wrong = next(x for x in prompt if not hasattr(x, "__index__"))
        raise RequestError(f"{name} holds {wrong!r}; expected text or token ids") from None
