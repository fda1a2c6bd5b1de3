"""Turns written by nobody: tokens drawn from a grammar's masks alone, by chance."""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from harmonium.harmony.grammar_state import TurnState
from harmonium.harmony.vocabulary import NUM_TEXT_TOKENS, VOCABULARY_SIZE, vocabulary


def ids_of(mask: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """The token ids of a mask."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


@lru_cache(maxsize=1)
def _closers() -> npt.NDArray[np.bool_]:
    """Special tokens, and what ends JSON values or parts of patterned ones: a uniform draw hardly would."""
    closes = np.zeros(VOCABULARY_SIZE, bool)
    closes[NUM_TEXT_TOKENS:] = True
    for token_id in range(NUM_TEXT_TOKENS):
        token = vocabulary().token_bytes(token_id)
        closes[token_id] = not token.strip(b'"}],:-@')
    return closes


@lru_cache(maxsize=1)
def _quotes() -> npt.NDArray[np.bool_]:
    return np.array([b'"' in vocabulary().token_bytes(token_id) for token_id in range(VOCABULARY_SIZE)])


def walk(state: TurnState, rng: random.Random, soft_limit: int = 200, hard_limit: int = 2000) -> list[int]:
    """Draw a turn. From soft_limit tokens on it takes what closes, if it may; at hard_limit it is cut off."""
    tokens: list[int] = []
    while not state.is_complete and len(tokens) < hard_limit:
        forced = state.forced_tokens()
        if forced and rng.random() < 0.8:
            for token_id in forced:
                state.advance(token_id)
            tokens += forced
            continue
        allowed = ids_of(state.mask())
        if forced:
            assert forced[0] in allowed, "a forced token is not allowed by the mask"
        closing = allowed[_closers()[allowed]]
        is_long = len(tokens) >= soft_limit
        if len(closing) and (is_long or rng.random() < 0.25):
            special = closing[closing >= NUM_TEXT_TOKENS]
            quoting = closing[_quotes()[closing]]
            if len(special) and (is_long or rng.random() < 0.3):
                allowed = special
            elif len(quoting) and rng.random() < 0.5:
                allowed = quoting
            else:
                allowed = closing
        token_id = int(allowed[rng.randrange(len(allowed))])
        state.advance(token_id)
        tokens.append(token_id)
    return tokens
