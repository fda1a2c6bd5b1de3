"""truncation "auto": what to leave out of a conversation that does not fit the context.

Whole blocks go, the oldest first. A block is a user's message, or an assistant's reasoning, text and calls
together with the results of the calls: a call never loses its result, and no message is cut inside. Kept at
all costs: instructions, tools, developer messages, the last message of a user, and the newest block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harmonium.harmony.messages import Message

MAX_ROOM_TOKENS = 4096
"""Room for the answer that truncation aims at where a request does not say how long it may get."""


@dataclass(frozen=True, slots=True)
class Truncated:
    """kept: places of the messages that stay, ascending. dropped: of those that go."""

    kept: tuple[int, ...]
    dropped: tuple[int, ...] = ()


def room_for_answer(context_length: int, max_tokens: int | None) -> int:
    """Tokens to keep free: what the answer may take, but never more than half of the context."""
    wanted = MAX_ROOM_TOKENS if max_tokens is None else max_tokens
    limit = context_length // 4 if max_tokens is None else context_length // 2
    return max(1, min(wanted, limit))


def truncate(
    messages: Sequence[Message], num_tokens: Callable[[Sequence[Message]], int], most: int
) -> Truncated:
    """The places of the messages that stay so that their prompt has at most `most` tokens.

    num_tokens: length of the prompt of these messages, opening included. If even the blocks that must stay
    are too many tokens, exactly those stay: the engine then says how much too long they are.
    """
    droppable = _droppable(messages, _blocks(messages))
    low, high = 0, len(droppable)
    while low < high:  # the fewest blocks whose absence is enough
        middle = (low + high) // 2
        kept = _without(len(messages), droppable[:middle])
        if num_tokens([messages[place] for place in kept]) <= most:
            high = middle
        else:
            low = middle + 1
    gone = droppable[:low]
    return Truncated(_without(len(messages), gone), tuple(sorted(place for block in gone for place in block)))


def _blocks(messages: Sequence[Message]) -> list[list[int]]:
    """Places of the messages that go together; developer messages are in none."""
    blocks: list[list[int]] = []
    before = ""
    for place, message in enumerate(messages):
        role = message.role
        continues = (role == "assistant" and before == "assistant") or (role == "tool" and bool(blocks))
        if role not in ("developer", "system"):
            if continues:
                blocks[-1].append(place)
            else:
                blocks.append([place])
            before = role
    return blocks


def _droppable(messages: Sequence[Message], blocks: Sequence[list[int]]) -> list[list[int]]:
    """Blocks that may go, oldest first: all but the last user's message (the task) and the newest."""
    users = [block for block in blocks if messages[block[0]].role == "user"]
    must_stay = [*users[-1:], *blocks[-1:]]
    return [block for block in blocks if block not in must_stay]


def _without(count: int, blocks: Sequence[Sequence[int]]) -> tuple[int, ...]:
    gone = {place for block in blocks for place in block}
    return tuple(place for place in range(count) if place not in gone)
