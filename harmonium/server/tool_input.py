"""The request's tools -> Harmony's. A custom tool takes free text in place of JSON arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from harmonium.errors import ApiError
from harmonium.harmony.chat_history import tools_from_chat
from harmonium.harmony.messages import Tool
from harmonium.server.config import Limits
from harmonium.server.sampling_fields import check_most

TEXT_SCHEMA: Mapping[str, Any] = {"type": "string"}
"""Parameters of a custom tool, so that the prompt shows `type f = (_: string) => any`."""


def read_tools(tools: Sequence[Mapping[str, Any]] | None, limits: Limits) -> tuple[Tool, ...]:
    """Raises ApiError for a tool that is no function or custom tool, or is too large; HarmonyError."""
    found = tools_from_chat([_as_function(index, tool) for index, tool in enumerate(tools or ())])
    for index, tool in enumerate(found):
        check_most(f"tools[{index}].name", len(tool.name), 256, unit="characters")
        if tool.parameters:
            check_schema_size(f"tools[{index}].parameters", tool.parameters, limits)
    return found


def _as_function(index: int, tool: Mapping[str, Any]) -> Mapping[str, Any]:
    if tool.get("type") != "custom":
        return tool
    custom = custom_fields(tool)
    if not isinstance(custom, Mapping):
        raise ApiError(f"tools[{index}].custom is no object", param=f"tools[{index}].custom")
    return {"name": custom.get("name"), "description": custom.get("description"), "parameters": TEXT_SCHEMA}


def custom_fields(tool: Mapping[str, Any]) -> Any:
    """Name, description and format of a custom tool: nested in Chat Completions, flat in Responses."""
    return tool.get("custom", tool)


def custom_names(tools: Sequence[Mapping[str, Any]] | None) -> frozenset[str]:
    """Names of those tools (which `read_tools` has accepted) whose calls carry free text."""
    return frozenset(custom_fields(tool)["name"] for tool in tools or () if tool.get("type") == "custom")


def check_schema_size(name: str, schema: Mapping[str, Any], limits: Limits) -> None:
    """Raises ApiError when the schema, written compactly, has more bytes than the limit."""
    size = len(json.dumps(schema, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"))
    check_most(name, size, limits.schema_bytes, unit="bytes")
