"""What Harmony can say: messages, tools, and the settings that open a conversation. Plain frozen data.

Source: openai/harmony:docs/format.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from harmonium.errors import HarmonyError

Role = Literal["system", "developer", "user", "assistant", "tool"]
ReasoningEffort = Literal["low", "medium", "high"]

ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant", "tool")
REASONING_EFFORTS: tuple[ReasoningEffort, ...] = ("low", "medium", "high")
CHANNELS = ("analysis", "commentary", "final")

DEFAULT_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
DEFAULT_KNOWLEDGE_CUTOFF = "2024-06"
CONSTRAIN_NAME = "<|constrain|>"
CONSTRAINED_JSON = f"{CONSTRAIN_NAME}json"
"""The content type of a function call's arguments: the special token, then the word."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    content: its text. channel: of an assistant's message or a tool's result. recipient: whom it is for, None
    for everybody; "functions.f" calls the function f. content_type: "code", or CONSTRAINED_JSON: a leading
    "<|constrain|>" stands for the special token. name: the author; required for a tool ("functions.f").
    token_ids: the whole message as the model wrote it, from <|start|> to its last token; rendered as they
    are, in place of everything else.
    """

    role: Role
    content: str
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None
    token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise HarmonyError(f"role is {self.role!r}; expected one of {', '.join(ROLES)}")
        if self.role == "tool" and not self.name:
            raise HarmonyError("a tool's message has no name; expected the tool's, such as 'functions.f'")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. parameters: its JSON schema; None or {}: it takes no arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class ToolNamespace:
    """Tools under one name, such as the built-in browser. description: printed above them, or alone."""

    name: str
    description: str = ""
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """A JSON schema that the final answer is to follow, as the developer message states it."""

    name: str
    schema: Mapping[str, object]
    description: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Everything that a prompt is made of.

    messages: after the opening system and developer messages, which are made from the other fields.
    instructions: the developer's; None or "": none. tools: the namespace `functions`. builtin_tools: listed
    in the system message. current_date: "2026-11-25"; None leaves the line out. model_identity,
    knowledge_cutoff: None leaves the line out.
    """

    messages: tuple[Message, ...] = ()
    instructions: str | None = None
    tools: tuple[Tool, ...] = ()
    builtin_tools: tuple[ToolNamespace, ...] = ()
    reasoning_effort: ReasoningEffort = "medium"
    current_date: str | None = None
    model_identity: str | None = DEFAULT_IDENTITY
    knowledge_cutoff: str | None = DEFAULT_KNOWLEDGE_CUTOFF
    response_format: ResponseFormat | None = None

    def __post_init__(self) -> None:
        reasoning_effort(self.reasoning_effort)
        _check_names("tools", [tool.name for tool in self.tools])
        _check_names("builtin_tools", [namespace.name for namespace in self.builtin_tools])


def _check_names(field: str, names: list[str]) -> None:
    for index, name in enumerate(names):
        if not name:
            raise HarmonyError(f"{field}[{index}] has no name")
        if name in names[:index]:
            raise HarmonyError(f"{field}[{index}] is named {name!r}, as {field}[{names.index(name)}] is")


def function_recipient(name: str) -> str:
    """The recipient of a call of the declared function `name`."""
    return f"functions.{name}"


def recorded_recipient(name: str) -> str:
    """The recipient of a call that a client's history holds.

    Other servers leave the namespace, or a glued `<|channel|>commentary`, in the name. The model repeats what
    it reads, so both are dropped; what they leave nothing of stays.
    """
    return function_recipient(_LEFT_IN_NAMES.sub("", name) or name)


_LEFT_IN_NAMES = re.compile(r"^(?:functions\.)+|<\|(?:channel|constrain|message)\|>.*$", re.DOTALL)


def function_name(recipient: str) -> str:
    """What a client calls the tool behind a recipient: without the namespace `functions`."""
    return recipient.removeprefix("functions.") or recipient


# The two tools that the models were trained with: text and schemas as openai/harmony:src/chat.rs declares
# them, for the models know these words by heart.
BROWSER = ToolNamespace(
    name="browser",
    description=(
        "Tool for browsing.\n"
        "The `cursor` appears in brackets before each browsing display: `[{cursor}]`.\n"
        "Cite information from the tool using the following format:\n"
        "`【{cursor}†L{line_start}(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.\n"
        "Do not quote more than 10 words directly from the tool output.\n"
        "sources=web (default: web)"
    ),
    tools=(
        Tool(
            "search",
            "Searches for information related to `query` and displays `topn` results.",
            {
                "type": "object",
                "properties": {
                    "query": {"type": "string"},
                    "topn": {"type": "number", "default": 10},
                    "source": {"type": "string"},
                },
                "required": ["query"],
            },
        ),
        Tool(
            "open",
            "Opens the link `id` from the page indicated by `cursor` starting at line number `loc`, showing "
            "`num_lines` lines.\n"
            "Valid link ids are displayed with the formatting: `【{id}†.*】`.\n"
            "If `cursor` is not provided, the most recent page is implied.\n"
            "If `id` is a string, it is treated as a fully qualified URL associated with `source`.\n"
            "If `loc` is not provided, the viewport will be positioned at the beginning of the document or "
            "centered on the most relevant passage, if available.\n"
            "Use this function without `id` to scroll to a new location of an opened page.",
            {
                "type": "object",
                "properties": {
                    "id": {"type": ["number", "string"], "default": -1},
                    "cursor": {"type": "number", "default": -1},
                    "loc": {"type": "number", "default": -1},
                    "num_lines": {"type": "number", "default": -1},
                    "view_source": {"type": "boolean", "default": False},
                    "source": {"type": "string"},
                },
            },
        ),
        Tool(
            "find",
            "Finds exact matches of `pattern` in the current page, or the page given by `cursor`.",
            {
                "type": "object",
                "properties": {"pattern": {"type": "string"}, "cursor": {"type": "number", "default": -1}},
                "required": ["pattern"],
            },
        ),
    ),
)
PYTHON = ToolNamespace(
    name="python",
    description=(
        "Use this tool to execute Python code in your chain of thought. The code will not be shown to the "
        "user. This tool should be used for internal reasoning, but not for code that is intended to be "
        "visible to the user (e.g. when creating plots, tables, or files).\n\n"
        "When you send a message containing Python code to python, it will be executed in a stateful Jupyter "
        "notebook environment. python will respond with the output of the execution or time out after 120.0 "
        "seconds. The drive at '/mnt/data' can be used to save and persist user files. Internet access for "
        "this session is UNKNOWN. Depends on the cluster."
    ),
)
BUILTIN_TOOLS: Mapping[str, ToolNamespace] = {"browser": BROWSER, "python": PYTHON}


def builtin_tool(name: str) -> ToolNamespace:
    """The built-in tool of this name. Raises HarmonyError for any name but "browser" and "python"."""
    if name not in BUILTIN_TOOLS:
        raise HarmonyError(f"built-in tool is {name!r}; expected one of {', '.join(BUILTIN_TOOLS)}")
    return BUILTIN_TOOLS[name]


def reasoning_effort(value: object) -> ReasoningEffort:
    """`value` as an effort. Raises HarmonyError, naming the value and what is expected, for anything else."""
    for effort in REASONING_EFFORTS:
        if value == effort:
            return effort
    raise HarmonyError(f"reasoning effort is {value!r}; expected one of {', '.join(REASONING_EFFORTS)}")
