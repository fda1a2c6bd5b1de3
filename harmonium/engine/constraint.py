"""Which tokens may follow: what an engine, which knows no text, asks of whoever does (harmony.grammar)."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt


class ConstraintState(Protocol):
    """Where one answer stands. Used by one thread at a time; whatever a call raises ends the answer."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer is over: no token may follow."""
        ...

    def mask(self) -> npt.NDArray[np.uint32]:
        """The tokens that may come next: ceil(V / 32) words, bit t % 32 of word t // 32 for token t.

        At least one bit is set. Not to be changed. Asked again before the next `advance` it is the same.
        """
        ...

    def forced_tokens(self) -> list[int]:
        """Tokens that must come next, [] where there is a choice. More may follow once these are told."""
        ...

    def advance(self, token_id: int) -> None:
        """Take the token that came."""
        ...

    def rollback(self, num_tokens: int) -> None:
        """Take the last tokens back, for an engine that guesses ahead."""
        ...

    def copy(self) -> ConstraintState:
        """A state that goes its own way from here."""
        ...


class Constraint(Protocol):
    """What an answer has to keep to, for any number of answers.

    One that engines in other processes may get can be pickled.
    """

    def start(self) -> ConstraintState:
        """The state before the first token of an answer.

        The first call behind unpickling may take seconds: not for an event loop or an engine's thread.
        """
        ...
