"""How much of a long prompt a step may take while others wait for their next token."""

from __future__ import annotations

FIRST_TOKENS = 32
"""Where the search starts: short of half a second even where a step reads every expert from a slow memory."""

LEAST_TOKENS = 8
"""A prompt gets on by so much in every step, however slow the machine is."""


class PrefillPace:
    """The most prompt tokens of a step in which other sequences decode, so that it takes about `seconds`.

    Follows the machine: after each such step the limit moves by what the step's time was off, at most by half
    down and a quarter up. Steps in which nobody decodes are not limited.
    """

    def __init__(self, seconds: float, max_tokens: int) -> None:
        self.seconds = seconds
        self.limit = min(FIRST_TOKENS, max_tokens)
        self._max_tokens = max_tokens

    def settle(self, num_tokens: int, seconds: float) -> None:
        """A step with num_tokens prompt tokens, and sequences that decode, took so long."""
        if seconds <= self.seconds and num_tokens < self.limit:
            return  # there was less to do than allowed: that it was quick says nothing
        factor = min(1.25, max(0.5, self.seconds / max(seconds, 1e-9)))
        grown = int(self.limit * factor) + (factor > 1)
        self.limit = max(min(LEAST_TOKENS, self._max_tokens), min(self._max_tokens, grown))
