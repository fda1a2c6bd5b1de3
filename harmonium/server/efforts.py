"""How long the model shall reason: all clients' words -> the three that the models were trained with."""

from __future__ import annotations

from collections.abc import Mapping

from harmonium.errors import ApiError
from harmonium.harmony.messages import ReasoningEffort

EFFORTS: Mapping[str, ReasoningEffort] = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}
"""The models always reason, so that none is their least."""


def effort_of(value: object, field: str, default: ReasoningEffort) -> ReasoningEffort:
    """The effort for this value of a request's field; None takes the default. Raises ApiError."""
    if value is None:
        return default
    if isinstance(value, str) and value in EFFORTS:
        return EFFORTS[value]
    shown = repr(value)[:60] if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
    raise ApiError(
        f"{field} is {shown}; expected one of {', '.join(EFFORTS)}", param=field, code="invalid_value"
    )
