"""JSON values inside a schema: how deep they are, how they are written, what a reference points to."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from urllib.parse import unquote

from harmonium.errors import HarmonyError

MAX_JSON_DEPTH = 400
"""Arrays and objects nested in one another, anywhere in the JSON."""


def resolve(root: object, ref: str) -> tuple[bool, object]:
    """(found, target) of a JSON pointer into the same document; only such references are followed."""
    if ref in ("#", "#/"):
        return ref == "#", root
    if not ref.startswith("#/"):
        return False, None
    target = root
    for step in unquote(ref[2:]).split("/"):
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(target, Mapping) and key in target:
            target = target[key]
        elif isinstance(target, list) and key.isdecimal() and len(key) < 10 and int(key) < len(target):
            target = target[int(key)]
        else:
            return False, None
    return True, target


def json_text(value: object) -> str:
    """JSON in one line, numbers as Rust's serde writes them (integers beyond 64 bits become floats)."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 64:
        return str(value)
    if isinstance(value, (int, float)):
        return _float(value)
    if isinstance(value, list):
        return f"[{','.join(json_text(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{json_text(str(key))}:{json_text(item)}' for key, item in value.items())}}}"
    raise HarmonyError(f"the JSON schema holds a {type(value).__name__}, which JSON does not have")


def _float(value: int | float) -> str:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise HarmonyError("the JSON schema holds a number that JSON cannot write")
    if 1e-5 <= abs(number) < 1e-4:  # where Python's repr has an exponent already and serde not yet
        digits, _, exponent = repr(abs(number)).partition("e-")
        return f"{'-' if number < 0 else ''}0.{'0' * (int(exponent) - 1)}{digits.replace('.', '')}"
    return re.sub(r"e([+-])0+", r"e\1", repr(number))


def check_json_depth(value: object) -> None:
    """Raises HarmonyError for nesting beyond MAX_JSON_DEPTH. A loop, so that no depth ends it early."""
    level: list[object] = [value]
    for _ in range(MAX_JSON_DEPTH):
        inner: list[object] = []
        for item in level:
            if isinstance(item, Mapping):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level = [item for item in inner if isinstance(item, (Mapping, list))]
        if not level:
            return
    raise HarmonyError(f"the JSON schema nests arrays and objects more than {MAX_JSON_DEPTH} levels deep")
