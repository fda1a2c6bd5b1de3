"""What a message's text may be: free, JSON of a schema, or what an expression or a Lark grammar describes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from harmonium.errors import RequestError

FormatKind = Literal["text", "json_object", "json_schema", "regex", "lark"]


@dataclass(frozen=True, slots=True)
class TextFormat:
    """What a message's text must be. definition: the JSON schema (as JSON), the expression, or the grammar.

    is_strict: of a schema: refuse the request when not all of it can be enforced.
    """

    kind: FormatKind = "text"
    definition: str = ""
    is_strict: bool = True

    @property
    def is_json(self) -> bool:
        return self.kind in ("json_object", "json_schema")


FREE_TEXT = TextFormat()
JSON_OBJECT = TextFormat("json_object", '{"type":"object"}')


def json_schema_format(schema: object, subject: str, is_strict: bool = True) -> TextFormat:
    """JSON that follows this schema; properties come in the schema's order.

    subject: named in errors. Raises RequestError for what is no JSON schema by its type, or not JSON at all.
    """
    if not isinstance(schema, Mapping):
        raise RequestError(f"{subject} is a {type(schema).__name__}; expected a JSON schema (an object)")
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
    except RecursionError:
        raise RequestError(f"{subject} is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise RequestError(f"{subject} is not JSON: {error}") from None
    return TextFormat("json_schema", text, is_strict)


def arguments_format(parameters: Mapping[str, object] | None, subject: str, is_strict: bool) -> TextFormat:
    """The arguments of a function: an object, whatever its schema says. None or {}: it takes no arguments."""
    if not parameters:
        return TextFormat("json_schema", '{"type":"object","additionalProperties":false}')
    schema = parameters if "type" in parameters else {"type": "object", **parameters}
    return json_schema_format(schema, subject, is_strict)
