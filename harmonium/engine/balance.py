"""Which server a request goes to: where its prefix is likely cached, unless others are much less busy.

The servers are vLLM's (engine/remote.py) or replicas of our own engine on Ray (engine/ray_router.py).
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from hashlib import blake2b
from typing import Protocol, TypeVar

BLOCK_TOKENS = 64
"""Prompts are compared in blocks of so many tokens. vLLM caches blocks of 16 or more."""

FIRST_BLOCKS = 4
"""Where a prompt goes that nobody has begun: a hash of so many blocks decides, for all that begin alike."""

_MOST_BLOCKS = 512
_MOST_REMEMBERED = 1 << 16
_ROOM = 2
_UNEVEN = 1.25


class Candidate(Protocol):
    """A server that may be chosen. name: tells it from all others, for as long as there is one.

    is_up: whether it gets requests. rests: it has no room now, and is passed over while others have. running:
    requests that it works on.
    """

    @property
    def name(self) -> str: ...

    @property
    def is_up(self) -> bool: ...

    @property
    def rests(self) -> bool: ...

    @property
    def running(self) -> int: ...


C = TypeVar("C", bound=Candidate)


class Balancer:
    """Remembers, by their names, who computed which prefixes, as long as it was lately."""

    def __init__(self) -> None:
        self._holders: OrderedDict[bytes, str] = OrderedDict()

    def choose(self, candidates: Iterable[C], blocks: Sequence[bytes], without: Collection[C]) -> C | None:
        """The one for this prompt, remembered for what follows; None where none is up.

        blocks: the prompt's `prefix_hashes`. without: those that have been tried.
        """
        there = [one for one in candidates if one.is_up and one not in without]
        rested = [one for one in there if not one.rests] or there
        if not rested:
            return None
        holder = self._holder(blocks)
        wanted = next((one for one in rested if one.name == holder), None)
        if wanted is None:
            key = blocks[min(len(blocks), FIRST_BLOCKS) - 1]
            wanted = max(rested, key=lambda one: _rank(key, one.name))
        mean = sum(one.running for one in rested) / len(rested)
        if wanted.running > _UNEVEN * mean + _ROOM:
            wanted = min(rested, key=lambda one: one.running)
        self.remember(blocks, wanted.name)
        return wanted

    def _holder(self, blocks: Sequence[bytes]) -> str | None:
        """Who computed at least half of the prompt. Less may be what all prompts begin with."""
        for number in range(len(blocks), (len(blocks) - 1) // 2, -1):
            holder = self._holders.get(blocks[number - 1])
            if holder is not None:
                return holder
        return None

    def remember(self, blocks: Sequence[bytes], name: str) -> None:
        """A prompt of these blocks went there, whoever chose that."""
        for block in blocks:
            self._holders[block] = name
            self._holders.move_to_end(block)
        while len(self._holders) > _MOST_REMEMBERED:
            self._holders.popitem(last=False)


def prefix_hashes(token_ids: Sequence[int], salt: str) -> list[bytes]:
    """A hash for each prefix of whole blocks, of the first 32,768 tokens; for less than one block: one.

    salt: prompts of different salts share nothing.
    """
    num_blocks = min(_MOST_BLOCKS, len(token_ids) // BLOCK_TOKENS)
    chain, found = blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=8).digest(), []
    for number in range(num_blocks):
        block = token_ids[number * BLOCK_TOKENS : (number + 1) * BLOCK_TOKENS]
        chain = blake2b(chain + struct.pack(f"<{len(block)}I", *block), digest_size=8).digest()
        found.append(chain)
    return found or [blake2b(chain + repr(tuple(token_ids)).encode(), digest_size=8).digest()]


def _rank(key: bytes, name: str) -> bytes:
    """Rendezvous hashing: when one goes, only its own prompts move."""
    return blake2b(key + name.encode(), digest_size=8).digest()
