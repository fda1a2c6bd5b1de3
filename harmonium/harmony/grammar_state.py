"""Where a turn stands in its grammar: which tokens may come next, which one must.

A turn is a row of messages. The state walks through headers (a tree of tokens) and bodies (free text, or a
matcher of llguidance); it is told every token and can take the last ones back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from harmonium.errors import EngineError
from harmonium.harmony.grammar_compile import MASK_WORDS, remove_special_tokens
from harmonium.harmony.grammar_header import Body, MessageKind, Node
from harmonium.harmony.vocabulary import NUM_TEXT_TOKENS, START, vocabulary

Mask = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Course:
    """How a turn may go. first: the tree of headers. final_is_bound: the answer has a format, so that no
    other text may stand beside it. max_reasoning_tokens: None is no limit. other_authors: first tokens of a
    tool's message: where the model wants to write one after a call, its turn is over.
    """

    headers: Node
    allows_final: bool
    max_calls: int
    final_is_bound: bool
    max_reasoning_tokens: int | None
    other_authors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Place:
    """A place, taken when num_tokens tokens were here. reasoning_tokens, num_calls, has_preamble: so far.

    node: in a header. body, matcher: in a message. Neither: the turn is over.
    """

    num_tokens: int
    node: Node | None
    body: Body | None = None
    matcher: LLMatcher | None = None
    reasoning_tokens: int = 0
    num_calls: int = 0
    has_preamble: bool = False


class TurnState:
    """One turn under its grammar. Not for several threads at once.

    Raises EngineError from every method when llguidance gives up on a text (its limits for a step).
    """

    def __init__(self, course: Course) -> None:
        self._course = course
        self._num_tokens = self._first = 0
        self._past: list[_Place] = []
        self._place = _Place(0, course.headers)

    @property
    def num_tokens(self) -> int:
        """Tokens told so far."""
        return self._num_tokens

    @property
    def is_complete(self) -> bool:
        """Whether the turn is over: no token may come."""
        return self._place.node is None and self._place.body is None

    def mask(self) -> Mask:
        """The tokens that may come next: a bit for each id, uint32 [6,284]. Not to be written to."""
        place = self._place
        if place.node is not None:
            return _mask_of(place.node.allowed(self._kinds()))
        assert place.body is not None, "a turn that is over takes no token"
        if self._reasoning_is_spent(place):
            return _mask_of([place.body.end])
        if place.matcher is None:
            return _free_mask(place.body.end)
        return self._matcher_mask(place.body, place.matcher)

    def _matcher_mask(self, body: Body, matcher: LLMatcher) -> Mask:
        mask = np.empty(MASK_WORDS, np.uint32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            raise EngineError(f"the grammar of {body.subject} failed: {matcher.get_error()}")
        remove_special_tokens(mask)
        if matcher.is_accepting():
            _set(mask, body.end)
        elif not mask.any():
            raise EngineError(f"the grammar of {body.subject} allows no token here")
        return mask

    def forced_tokens(self) -> list[int]:
        """The tokens that must come next, where there is no choice; [] where there is one, or at the end.

        There may be more behind them: ask again after telling them.
        """
        place = self._place
        if place.node is not None:
            return self._forced_header(place.node)
        if place.body is None:
            return []
        if self._reasoning_is_spent(place):
            return [place.body.end]
        if place.matcher is None:
            return []
        if place.matcher.is_accepting():
            return [place.body.end] if place.matcher.is_stopped() else []
        forced = place.matcher.compute_ff_tokens()
        return forced if all(token_id < NUM_TEXT_TOKENS for token_id in forced) else []

    def _forced_header(self, node: Node) -> list[int]:
        kinds, forced = self._kinds(), []
        while len(allowed := node.allowed(kinds)) == 1:
            forced.append(allowed[0])
            node = node.next[allowed[0]]
        return forced

    def advance(self, token_id: int) -> None:
        """Tell the next token. Raises EngineError, and stays where it is, for one that is not allowed."""
        place = self._place
        if place.node is not None:
            following = place.node.next.get(token_id)
            if following is None or not following.kinds & self._kinds():
                raise self._illegal(token_id)
            self._go(self._enter(place, following))
        elif place.body is not None:
            self._advance_body(place, place.body, token_id)
        else:
            raise self._illegal(token_id)
        self._num_tokens += 1

    def _advance_body(self, place: _Place, body: Body, token_id: int) -> None:
        matcher = place.matcher
        if token_id == body.end:
            if matcher is not None and not matcher.is_accepting():
                raise self._illegal(token_id)
            self._go(self._leave(place, body))
            return
        is_text = 0 <= token_id < NUM_TEXT_TOKENS and not self._reasoning_is_spent(place)
        if not is_text or (matcher is not None and not matcher.try_consume_tokens([token_id])):
            if matcher is not None and matcher.is_error():
                raise EngineError(f"the grammar of {body.subject} failed: {matcher.get_error()}")
            raise self._illegal(token_id)

    def _illegal(self, token_id: int) -> EngineError:
        shown = vocabulary().decode([token_id])
        return EngineError(
            f"token {self._num_tokens:,} of the turn is {shown!r}; its grammar does not allow it"
        )

    def _go(self, place: _Place) -> None:
        self._past.append(self._place)
        self._place = place

    def _enter(self, place: _Place, node: Node) -> _Place:
        num_tokens = self._num_tokens + 1
        if node.body is not None:
            matcher = node.body.text.start() if node.body.text is not None else None
            return replace(place, num_tokens=num_tokens, node=None, body=node.body, matcher=matcher)
        if not node.next:  # another author's message, which is not ours to write
            return replace(place, num_tokens=num_tokens, node=None)
        return replace(place, num_tokens=num_tokens, node=node)

    def _leave(self, place: _Place, body: Body) -> _Place:
        """What follows a message."""
        num_calls = place.num_calls + (body.kind == MessageKind.CALL)
        node: Node | None = None
        if body.kind in (MessageKind.REASONING, MessageKind.PREAMBLE):
            node = _chain([START, *_assistant()], self._course.headers)
        elif body.kind == MessageKind.CALL and num_calls < self._course.max_calls:
            node = self._after_call()
        return _Place(
            self._num_tokens + 1,
            node,
            reasoning_tokens=self._reasoning_tokens(place),
            num_calls=num_calls,
            has_preamble=place.has_preamble or body.kind == MessageKind.PREAMBLE,
        )

    def _after_call(self) -> Node:
        """The model was trained to read the tool's message next; that it would begin one ends its turn."""
        another = _chain(_assistant(), self._course.headers)
        for token_id in self._course.other_authors:
            another.next.setdefault(token_id, Node(MessageKind.CALL))
        return Node(another.kinds, {START: another})

    def _kinds(self) -> MessageKind:
        """The messages that may come now."""
        course, place = self._course, self._place
        if place.num_calls:
            return MessageKind.CALL
        limit = course.max_reasoning_tokens
        is_spent = limit is not None and place.reasoning_tokens >= limit
        kinds = MessageKind(0)
        if not is_spent:
            kinds |= MessageKind.REASONING
        if course.max_calls:
            kinds |= MessageKind.CALL
            if not is_spent or limit == 0:
                kinds |= MessageKind.PREAMBLE
        if course.allows_final and not (place.has_preamble and course.final_is_bound):
            kinds |= MessageKind.FINAL
        return kinds

    def _reasoning_tokens(self, place: _Place) -> int:
        if place.body is None or place.body.kind != MessageKind.REASONING:
            return place.reasoning_tokens
        return place.reasoning_tokens + self._num_tokens - place.num_tokens

    def _reasoning_is_spent(self, place: _Place) -> bool:
        limit = self._course.max_reasoning_tokens
        if limit is None or place.body is None or place.body.kind != MessageKind.REASONING:
            return False
        return self._reasoning_tokens(place) >= limit

    def rollback(self, num_tokens: int) -> None:
        """Take the last tokens back; not past the place where a copy was made."""
        target = self._num_tokens - num_tokens
        if not self._first <= target <= self._num_tokens:
            raise EngineError(f"cannot take back {num_tokens:,} tokens; {self._num_tokens:,} were told")
        while self._place.num_tokens > target:
            self._num_tokens = self._place.num_tokens - 1
            self._place = self._past.pop()
        if self._place.matcher is not None and self._num_tokens > target:
            self._place.matcher.rollback(self._num_tokens - target)
        self._num_tokens = target

    def copy(self) -> TurnState:
        """A state that goes its own way from here; it cannot be taken back further than this place."""
        other = TurnState(self._course)
        other._num_tokens = other._first = self._num_tokens
        place = self._place
        other._place = replace(place, matcher=place.matcher.deep_copy()) if place.matcher else place
        return other


def _chain(token_ids: list[int], end: Node) -> Node:
    for token_id in reversed(token_ids):
        end = Node(end.kinds, {token_id: end})
    return end


@lru_cache(maxsize=1)
def _assistant() -> list[int]:
    return vocabulary().encode("assistant")


def _set(mask: Mask, token_id: int) -> None:
    mask[token_id // 32] |= np.uint32(1 << (token_id % 32))


def _mask_of(token_ids: list[int]) -> Mask:
    mask = np.zeros(MASK_WORDS, np.uint32)
    for token_id in token_ids:
        _set(mask, token_id)
    return mask


@lru_cache(maxsize=8)
def _free_mask(end: int) -> Mask:
    """Any text token, and the token that closes the message."""
    mask = np.full(MASK_WORDS, 0xFFFFFFFF, np.uint32)
    remove_special_tokens(mask)
    _set(mask, end)
    mask.setflags(write=False)
    return mask
