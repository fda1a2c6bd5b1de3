"""One pool of cache blocks: which are free, which cached, which used and by how many."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from harmonium.engine.prefix import PrefixNode

ABSENT = -1
"""In a block table: not allocated, or left the window."""


class BlockPool:
    """Blocks 0 to num_blocks - 1 of one kind: each is free, cached (a node's, held by nobody) or used."""

    def __init__(self, num_blocks: int, on_evict: Callable[[PrefixNode], None]) -> None:
        self.num_blocks = num_blocks
        self.node_of: list[PrefixNode | None] = [None] * num_blocks
        self.num_released = 0
        self._holders = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cold: OrderedDict[int, None] = OrderedDict()
        self._warm: OrderedDict[int, None] = OrderedDict()
        self._on_evict = on_evict

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cold) + len(self._warm)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    @property
    def num_available(self) -> int:
        """Blocks that `take` can give: the free and the cached."""
        return len(self._free) + len(self._cold) + len(self._warm)

    def is_used(self, block: int) -> bool:
        return self._holders[block] > 0

    def take(self) -> int:
        """A block for one holder; the least recently used cached block is forgotten when none is free."""
        if not self._free:
            lru = self._cold or self._warm
            block, _ = lru.popitem(last=False)
            node = self.node_of[block]
            assert node is not None, "a cached block belongs to a node"
            self.node_of[block] = None
            self._free.append(block)
            self._on_evict(node)
        block = self._free.pop()
        self._holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder for a used or cached block."""
        if self._holders[block] == 0:
            self._drop_cached(block)
        self._holders[block] += 1

    def release(self, block: int, is_warm: bool = True) -> None:
        """One holder less. A node's block without holders stays cached, another becomes free."""
        assert self._holders[block] > 0, f"block {block} is released but nobody holds it"
        self._holders[block] -= 1
        if self._holders[block]:
            return
        self.num_released += 1
        if self.node_of[block] is None:
            self._free.append(block)
        else:
            (self._warm if is_warm else self._cold)[block] = None

    def forget(self, block: int) -> None:
        """Free a cached block whose node is gone."""
        self._drop_cached(block)
        self.node_of[block] = None
        self._free.append(block)

    def _drop_cached(self, block: int) -> None:
        if self._warm.pop(block, ABSENT) is ABSENT:
            del self._cold[block]

    def check(self, holders: Iterable[int]) -> None:
        """Assert that every block is in exactly one state, given each holding of each holder."""
        counted = [0] * self.num_blocks
        for block in holders:
            counted[block] += 1
        assert counted == self._holders, "a block's holders differ from the tables that name it"
        cached = [*self._cold, *self._warm]
        used = [block for block, count in enumerate(self._holders) if count]
        assert sorted([*self._free, *cached, *used]) == list(range(self.num_blocks)), (
            "free + cached + used != all"
        )
        assert all(self.node_of[block] is not None for block in cached), "a cached block without a node"
        assert all(self.node_of[block] is None for block in self._free), "a free block with a node"
