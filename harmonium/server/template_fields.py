"""`chat_template_kwargs`: what clients of template-driven servers set; the part that Harmony can say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harmonium.errors import ApiError
from harmonium.harmony.messages import (
    BUILTIN_TOOLS,
    DEFAULT_IDENTITY,
    DEFAULT_KNOWLEDGE_CUTOFF,
    ReasoningEffort,
)
from harmonium.server.efforts import effort_of

_NAME = "chat_template_kwargs"
_TEXTS = ("model_identity", "knowledge_cutoff", "current_date")
_MAX_CHARS = 4096


@dataclass(frozen=True, slots=True)
class TemplateFields:
    """effort, current_date: None where the request says nothing, so that others decide."""

    effort: ReasoningEffort | None = None
    model_identity: str = DEFAULT_IDENTITY
    knowledge_cutoff: str = DEFAULT_KNOWLEDGE_CUTOFF
    current_date: str | None = None
    builtin_tools: tuple[str, ...] = ()


def read_template_fields(given: Mapping[str, Any] | None) -> TemplateFields:
    """Raises ApiError, naming it, for a field that has no meaning here or a value that it cannot have."""
    found: dict[str, Any] = {}
    for name, value in (given or {}).items():
        where = f"{_NAME}.{name[:60]}"
        if name in _TEXTS:
            if not isinstance(value, str) or len(value) > _MAX_CHARS:
                raise ApiError(f"{where} is no text of at most {_MAX_CHARS:,} characters", param=where)
            found[name] = value
        elif name == "reasoning_effort":
            found["effort"] = None if value is None else effort_of(value, where, "medium")
        elif name == "builtin_tools":
            found[name] = _builtin_tools(where, value)
        else:
            known = ", ".join((*_TEXTS, "reasoning_effort", "builtin_tools"))
            raise ApiError(f"{where} has no meaning here; there are {known}", param=where)
    return TemplateFields(**found)


def _builtin_tools(where: str, value: object) -> tuple[str, ...]:
    names = tuple(value) if isinstance(value, (list, tuple)) else None
    if names is None or any(not isinstance(name, str) or name not in BUILTIN_TOOLS for name in names):
        raise ApiError(f"{where} is no list of {' and '.join(BUILTIN_TOOLS)}", param=where)
    if len(set(names)) != len(names):
        raise ApiError(f"{where} names a tool twice", param=where)
    return names
