"""Tools of a Responses request -> functions that Harmony can declare, and back from a call to an item.

    table = read_tools(request.tools)
    table.harmony_tools        # what the prompt declares
    table.entry("shell")       # what a call of that name is: function or custom, in which namespace
    table.skipped              # types of tools that only OpenAI's own servers run

A `namespace` is flattened: its function `read` of `files` is declared as `files__read`; a call of it comes
back as name `read`, namespace `files`. A custom tool takes free text and is declared as a function of a
string.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harmonium.errors import RequestError
from harmonium.harmony.messages import Tool

ToolKind = Literal["function", "custom"]

HOSTED_TYPES = (
    "web_search",
    "web_search_preview",
    "file_search",
    "code_interpreter",
    "image_generation",
    "computer",
    "computer_use_preview",
    "local_shell",
    "shell",
    "apply_patch",
    "tool_search",
    "mcp",
    "programmatic_tool_calling",
)
"""Types whose tools run on OpenAI's servers or need a protocol of their own: skipped, with a warning."""

_MAX_NAME = 128


@dataclass(frozen=True, slots=True)
class ToolEntry:
    """One tool that the model may call.

    name: as the client knows it. declared: the function's name in the prompt; it differs in a namespace.
    parameters: a function's JSON schema. format: a custom tool's, as the client gave it.
    """

    kind: ToolKind
    name: str
    declared: str
    namespace: str | None = None
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    is_strict: bool = False
    format: Mapping[str, Any] | None = None

    def to_harmony(self) -> Tool:
        """As the prompt declares it."""
        if self.kind == "function":
            return Tool(self.declared, self.description, self.parameters)
        return Tool(self.declared, _custom_description(self), {"type": "string"})


@dataclass(frozen=True, slots=True)
class ToolTable:
    """All tools of a request. echo: as the response object shows them. skipped: types left out."""

    entries: tuple[ToolEntry, ...] = ()
    echo: tuple[dict[str, Any], ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def harmony_tools(self) -> tuple[Tool, ...]:
        """What the prompt declares, in the order of the request."""
        return tuple(entry.to_harmony() for entry in self.entries)

    def entry(self, declared: str) -> ToolEntry | None:
        """The tool that the model called by this name; None for one that nobody offered."""
        return next((entry for entry in self.entries if entry.declared == declared), None)


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> ToolTable:
    """Read the tools of a request.

    Raises RequestError that names the place for an unknown type, a name that is missing or doubled, and
    parameters that are no object.
    """
    entries: list[ToolEntry] = []
    echo: list[dict[str, Any]] = []
    skipped: list[str] = []
    for index, tool in enumerate(tools or ()):
        where, kind = f"tools[{index}]", tool.get("type", "function")
        if kind == "namespace":
            entries += _namespace(where, tool)
            echo.append(dict(tool))
        elif kind in ("function", "custom"):
            entry = _entry(where, tool, None)
            entries.append(entry)
            echo.append(_echo(entry, tool))
        elif kind in HOSTED_TYPES or str(kind).startswith(("web_search", "computer_use")):
            skipped.append(str(kind))
            echo.append(dict(tool))
        else:
            known = ", ".join(("function", "custom", "namespace", *HOSTED_TYPES))
            raise RequestError(f"{where}.type is {str(kind)[:80]!r}; expected one of {known}")
    _check_unique(entries)
    return ToolTable(tuple(entries), tuple(echo), tuple(skipped))


def declared_name(name: str, namespace: str | None) -> str:
    """The name in the prompt of a function of a namespace: `files__read`; of none: its own."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


def _namespace(where: str, tool: Mapping[str, Any]) -> list[ToolEntry]:
    name, inner = tool.get("name"), tool.get("tools")
    if not isinstance(name, str) or not name or name.split() != [name]:
        raise RequestError(f"{where}.name is {_shown(name)}; expected a name without blanks")
    if not isinstance(inner, list):
        raise RequestError(f"{where}.tools is {_shown(inner)}; expected a list of functions")
    entries = []
    for index, item in enumerate(inner):
        place = f"{where}.tools[{index}]"
        if not isinstance(item, Mapping) or item.get("type", "function") not in ("function", "custom"):
            raise RequestError(f"{place} is {_shown(item)}; expected a function or a custom tool")
        entries.append(_entry(place, item, name))
    return entries


def _entry(where: str, tool: Mapping[str, Any], namespace: str | None) -> ToolEntry:
    # Chat Completions nests a tool under its type; clients that serve both APIs send that here too.
    kind: ToolKind = "custom" if tool.get("type") == "custom" else "function"
    nested = tool.get(kind)
    body = nested if "name" not in tool and isinstance(nested, Mapping) else tool
    name, description = body.get("name"), body.get("description")
    if not isinstance(name, str) or not name or name.split() != [name] or len(name) > _MAX_NAME:
        raise RequestError(
            f"{where}.name is {_shown(name)}; expected 1 to {_MAX_NAME} characters without blanks"
        )
    if description is not None and not isinstance(description, str):
        raise RequestError(f"{where}.description is {_shown(description)}; expected text")
    parameters, form = body.get("parameters"), body.get("format")
    for field, value in (("parameters", parameters), ("format", form)):
        if value is not None and not isinstance(value, Mapping):
            raise RequestError(f"{where}.{field} is {_shown(value)}; expected an object")
    if kind == "custom":
        _check_format(where, form)
    return ToolEntry(
        kind=kind,
        name=name,
        declared=declared_name(name, namespace),
        namespace=namespace,
        description=description or "",
        parameters=parameters if kind == "function" else None,
        is_strict=bool(body.get("strict")),
        format=form if kind == "custom" else None,
    )


def _check_format(where: str, form: Mapping[str, Any] | None) -> None:
    kind = (form or {}).get("type", "text")
    if kind not in ("text", "grammar"):
        raise RequestError(f"{where}.format.type is {_shown(kind)}; expected 'text' or 'grammar'")
    if kind == "grammar":
        assert form is not None, "its type is grammar"
        if form.get("syntax") not in ("lark", "regex"):
            raise RequestError(
                f"{where}.format.syntax is {_shown(form.get('syntax'))}; expected 'lark' or 'regex'"
            )
        if not isinstance(form.get("definition"), str):
            raise RequestError(
                f"{where}.format.definition is {_shown(form.get('definition'))}; expected text"
            )


def _custom_description(entry: ToolEntry) -> str:
    form = entry.format or {}
    lines = [entry.description] if entry.description else []
    lines.append("The input is plain text as it stands: no JSON, no quotes around it.")
    if form.get("type") == "grammar":
        lines += [f"The input follows this {form['syntax']} grammar:", str(form["definition"]).strip("\n")]
    return "\n".join(lines)


def _echo(entry: ToolEntry, tool: Mapping[str, Any]) -> dict[str, Any]:
    """As the client sent it, with every key that the API's types require."""
    if entry.kind == "custom":
        return {**tool, "type": "custom", "name": entry.name}
    return {
        **{key: value for key, value in tool.items() if key != "function"},
        "type": "function",
        "name": entry.name,
        "description": entry.description or None,
        "parameters": entry.parameters,
        "strict": entry.is_strict,
    }


def _check_unique(entries: Sequence[ToolEntry]) -> None:
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries):
        if entry.declared in seen:
            raise RequestError(f"tools has {entry.declared!r} twice; names must differ, namespaces included")
        seen[entry.declared] = index


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What the model may or must call.

    mode "required": at least one call. allowed: declared names among which it chooses; None: all.
    """

    mode: Literal["none", "auto", "required"] = "auto"
    allowed: tuple[str, ...] | None = None


def read_tool_choice(choice: str | Mapping[str, Any] | None, table: ToolTable) -> ToolChoice:
    """Read `tool_choice`. Raises RequestError for a tool that the request does not offer."""
    if choice is None or isinstance(choice, str):
        if choice == "required" and not table.entries:
            raise RequestError("tool_choice is 'required', and the request offers no tool that can be called")
        return ToolChoice("none" if choice == "none" else "required" if choice == "required" else "auto")
    kind = choice.get("type")
    if kind in ("function", "custom"):
        return ToolChoice("required", (_chosen("tool_choice", choice, table),))
    if kind == "allowed_tools":
        nested = choice.get("allowed_tools")
        body = nested if isinstance(nested, Mapping) else choice
        mode, tools = body.get("mode", "auto"), body.get("tools")
        if mode not in ("none", "auto", "required"):
            raise RequestError(f"tool_choice.mode is {_shown(mode)}; expected 'auto' or 'required'")
        if not isinstance(tools, list) or not tools:
            raise RequestError(f"tool_choice.tools is {_shown(tools)}; expected a list of tools")
        names = [_chosen(f"tool_choice.tools[{index}]", tool, table) for index, tool in enumerate(tools)]
        return ToolChoice(mode, tuple(dict.fromkeys(names)))
    raise RequestError(
        f"tool_choice.type is {_shown(kind)}; expected 'function', 'custom' or 'allowed_tools': "
        "no other tool is run here"
    )


def _chosen(where: str, choice: object, table: ToolTable) -> str:
    body = choice if isinstance(choice, Mapping) else {}
    nested = body.get(str(body.get("type")))
    name = body.get("name", nested.get("name") if isinstance(nested, Mapping) else None)
    declared = declared_name(name, body.get("namespace")) if isinstance(name, str) else ""
    if table.entry(declared) is None:
        offered = ", ".join(entry.declared for entry in table.entries) or "none"
        raise RequestError(f"{where} names {_shown(name)}; the request offers {offered[:400]}")
    return declared


def _shown(value: object) -> str:
    """A value for a message: short whatever it is."""
    if value is None:
        return "missing"
    if isinstance(value, (str, int, float, bool)):
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return "an object" if isinstance(value, Mapping) else "a list" if isinstance(value, list) else "a value"
