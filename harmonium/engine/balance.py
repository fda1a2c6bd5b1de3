"""Which upstream a request goes to: where its prefix is likely cached, unless others are much less busy."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Collection, Sequence
from hashlib import blake2b

from harmonium.engine.upstream import Upstream

BLOCK_TOKENS = 64
"""Prompts are compared in blocks of so many tokens. vLLM caches blocks of 16 or more."""

FIRST_BLOCKS = 4
"""Where a prompt goes that nobody has begun: a hash of so many blocks decides, for all that begin alike."""

_MOST_BLOCKS = 512
_MOST_REMEMBERED = 1 << 16
_ROOM = 2
_UNEVEN = 1.25


class Balancer:
    """Remembers who computed which prefixes, as long as it was lately."""

    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        self.upstreams = tuple(upstreams)
        self._holders: OrderedDict[bytes, Upstream] = OrderedDict()

    def choose(self, token_ids: Sequence[int], salt: str, without: Collection[Upstream]) -> Upstream | None:
        """The upstream for this prompt, remembered for what follows; None where none is up.

        salt: prompts of different salts share nothing. without: those that have been tried.
        """
        there = [one for one in self.upstreams if one.is_up and one not in without]
        rested = [one for one in there if not one.rests] or there
        if not rested:
            return None
        blocks = prefix_hashes(token_ids, salt)
        wanted = self._holder(blocks)
        if wanted not in rested:
            key = blocks[min(len(blocks), FIRST_BLOCKS) - 1]
            wanted = max(rested, key=lambda one: _rank(key, one))
        assert wanted is not None, "there is one at least"
        mean = sum(one.running for one in rested) / len(rested)
        if wanted.running > _UNEVEN * mean + _ROOM:
            wanted = min(rested, key=lambda one: one.running)
        self._remember(blocks, wanted)
        return wanted

    def _holder(self, blocks: Sequence[bytes]) -> Upstream | None:
        """Who computed at least half of the prompt. Less may be what all prompts begin with."""
        for number in range(len(blocks), (len(blocks) - 1) // 2, -1):
            holder = self._holders.get(blocks[number - 1])
            if holder is not None:
                return holder
        return None

    def _remember(self, blocks: Sequence[bytes], upstream: Upstream) -> None:
        for block in blocks:
            self._holders[block] = upstream
            self._holders.move_to_end(block)
        while len(self._holders) > _MOST_REMEMBERED:
            self._holders.popitem(last=False)


def prefix_hashes(token_ids: Sequence[int], salt: str) -> list[bytes]:
    """A hash for each prefix of whole blocks, of the first 32,768 tokens; for less than one block: one."""
    num_blocks = min(_MOST_BLOCKS, len(token_ids) // BLOCK_TOKENS)
    chain, found = blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=8).digest(), []
    for number in range(num_blocks):
        block = token_ids[number * BLOCK_TOKENS : (number + 1) * BLOCK_TOKENS]
        chain = blake2b(chain + struct.pack(f"<{len(block)}I", *block), digest_size=8).digest()
        found.append(chain)
    return found or [blake2b(chain + repr(tuple(token_ids)).encode(), digest_size=8).digest()]


def _rank(key: bytes, upstream: Upstream) -> bytes:
    """Rendezvous hashing: when an upstream goes, only its own prompts move."""
    return blake2b(key + upstream.address.text.encode(), digest_size=8).digest()
