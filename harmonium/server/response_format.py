"""`response_format` (and Responses' `text.format`): what the final answer must look like."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from harmonium.errors import ApiError
from harmonium.harmony.messages import ResponseFormat
from harmonium.server.config import Limits
from harmonium.server.sampling_fields import check_most


def read_response_format(
    given: Mapping[str, Any] | None, where: str, limits: Limits
) -> ResponseFormat | None:
    """The schema as the prompt states it; None where the answer is free text or any JSON object.

    where: the field's name, for errors. A json_schema may be nested ({"json_schema": {...}}) or flat.
    Raises ApiError for an unknown type, a missing name or schema, and a schema that is too large.
    """
    if given is None or given.get("type") in ("text", "json_object"):
        return None
    if given.get("type") != "json_schema":
        raise ApiError(
            f"{where}.type is {str(given.get('type'))[:40]!r}; expected text, json_object or json_schema",
            param=f"{where}.type",
        )
    is_nested = isinstance(given.get("json_schema"), Mapping)
    form: Mapping[str, Any] = given["json_schema"] if is_nested else given
    path = f"{where}.json_schema" if is_nested or "schema" not in given else where
    name, schema, description = form.get("name"), form.get("schema"), form.get("description")
    if not isinstance(name, str) or not name or len(name) > 64:
        raise ApiError(f"{path}.name is no name of 1 to 64 characters", param=f"{path}.name")
    if not isinstance(schema, Mapping):
        raise ApiError(f"{path}.schema is no JSON schema (an object)", param=f"{path}.schema")
    check_schema_size(f"{path}.schema", schema, limits)
    return ResponseFormat(name, schema, description if isinstance(description, str) else "")


def check_schema_size(name: str, schema: Mapping[str, Any], limits: Limits) -> None:
    """Raises ApiError when the schema, written compactly, has more bytes than the limit."""
    size = len(json.dumps(schema, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"))
    check_most(name, size, limits.schema_bytes, unit="bytes")
