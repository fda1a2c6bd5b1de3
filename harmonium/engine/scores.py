"""How likely a prompt's tokens were, from logits that come in pieces and are not kept."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from harmonium.engine.protocol import Token


class PromptScores:
    """A sink of logits: row i says how likely each token is at position i + 1."""

    def __init__(self, token_ids: tuple[int, ...], num_top: int) -> None:
        """num_top: how many of the likeliest to keep for each position."""
        self._token_ids = token_ids
        self._num_top = num_top
        self._tokens = [Token(token_ids[0])] if token_ids else []

    @property
    def tokens(self) -> tuple[Token, ...]:
        """One for each token of the prompt, the first without a log-probability."""
        return tuple(self._tokens)

    def append(self, logits_TV: npt.NDArray[np.float32], /) -> None:
        """Take the next rows; the last row of the prompt tells of a token that is not in it."""
        for logits_V in logits_TV:
            if len(self._tokens) < len(self._token_ids):
                self._tokens.append(self._score(self._token_ids[len(self._tokens)], logits_V))

    def _score(self, token_id: int, logits_V: npt.NDArray[np.float32]) -> Token:
        best = float(logits_V.max())
        log_sum = best + float(np.log(np.exp(logits_V - best).sum(dtype=np.float64)))
        count = min(self._num_top, len(logits_V))
        top: tuple[tuple[int, float], ...] = ()
        if count:
            among = np.argpartition(-logits_V, count - 1)[:count]
            # Ties by the lower id, as the sampler reports them.
            ordered = sorted(among.tolist(), key=lambda place: (-float(logits_V[place]), place))
            top = tuple((place, float(logits_V[place]) - log_sum) for place in ordered)
        return Token(token_id, float(logits_V[token_id]) - log_sum, top)
