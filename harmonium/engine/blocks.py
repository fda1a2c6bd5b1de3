"""Who holds which block of the paged key/value cache. Bookkeeping only: no key or value passes through here.

Two pools. A sequence keeps its full-attention blocks for life; of its window blocks it keeps those that a
later query can still see, and its table says -1 for the others.

Prefix reuse. A complete block becomes a node of the prefix index and never changes again; whoever computes
the same block later shares it. When nobody holds it any more it stays cached until its memory is wanted: a
block is free, cached or used. A sequence may resume after n cached blocks only if the full-attention blocks
of all of them and the window blocks of the last `window - 1` positions are there. Recomputing only those
positions would not do: their window keys in an upper layer depend on still earlier positions through the
window layers below. So window blocks that end a prompt, end a sequence, or lie where two prompts were seen to
part are kept longest ("warm"); those that merely left a window go first ("cold").

Behind its last whole block a sequence may begin as another one's block does, which differs later on or goes
on where the sequence ends. That block is copied and its first positions are used, so that a prompt that was
seen before computes its last token alone.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.model_config import LayerKind
from harmonium.engine.pool import ABSENT, BlockPool
from harmonium.engine.prefix import PrefixIndex, PrefixNode, next_digest, salt_digest

TokenIds = npt.NDArray[np.int32]

RESTORED_AT_ONCE = 64
"""Blocks that `restore` reads in one call (50 MB for a 20b), so that those that run wait for it briefly."""


class BlockStorage(Protocol):
    """Keeps what complete blocks hold, outside the pools."""

    def has(self, digest: bytes, kind: LayerKind) -> bool:
        """Whether it seems to have that block."""
        ...

    def save(self, node: PrefixNode, kind: LayerKind) -> None:
        """Keep the node's block of that kind, as it is now, unless it is kept."""
        ...

    def load(self, digest: bytes, parent: bytes, token_bytes: bytes, kind: LayerKind, block: int) -> bool:
        """Fill a block of the pool; False when it has none that is whole."""
        ...


@runtime_checkable
class BlockCopier(Protocol):
    """A runner that copies cache blocks."""

    def copy_block(self, kind: LayerKind, source: int, target: int) -> None:
        """Keys and values of a block to another, in all layers of its kind. Between two steps only."""
        ...


class Lease:
    """What one sequence holds of the cache.

    row: its row in the block tables. num_computed: positions whose keys and values are in the cache.
    num_blocks: blocks it has from the start of the table. window_start: first block that a query can still
    see. nodes: its complete blocks in the prefix index. anchors: numbers of blocks after which it should stay
    possible to resume. is_chained: False once a block could not enter the index; then none of the later can.
    """

    __slots__ = (
        "anchors",
        "is_chained",
        "nodes",
        "num_blocks",
        "num_computed",
        "row",
        "salt",
        "window_start",
    )

    def __init__(self, row: int, salt: str, is_chained: bool) -> None:
        self.row = row
        self.salt = salt
        self.num_computed = 0
        self.num_blocks = 0
        self.window_start = 0
        self.nodes: list[PrefixNode] = []
        self.anchors: list[int] = []
        self.is_chained = is_chained


class PagedCache:
    """Leases blocks of two pools to sequences.

    full_block_SB, window_block_SB: int32 block tables, one row for each of max_sequences leases.
    """

    def __init__(
        self,
        num_full_blocks: int,
        num_window_blocks: int,
        *,
        block_tokens: int,
        window: int,
        max_sequences: int,
        max_tokens: int,
        prefix_cache: bool = True,
        storage: BlockStorage | None = None,
        copier: BlockCopier | None = None,
    ) -> None:
        """storage: where complete blocks are kept besides, None: nowhere. copier: None: whole blocks alone
        are used again.
        """
        self._storage = storage if prefix_cache else None
        self._copier = copier
        self.num_restored = 0
        self.block_tokens = block_tokens
        self.window = window
        self.full = BlockPool(num_full_blocks, self._forget_node)
        self.windowed = BlockPool(num_window_blocks, self._forget_window)
        self.index = PrefixIndex()
        self._reuses = prefix_cache
        width = -(-max_tokens // block_tokens)
        self.full_block_SB = np.full((max_sequences, width), ABSENT, np.int32)
        self.window_block_SB = np.full((max_sequences, width), ABSENT, np.int32)
        self._rows = list(range(max_sequences - 1, -1, -1))
        self._leases: dict[int, Lease] = {}

    @property
    def window_blocks_before(self) -> int:
        """Window blocks that must be there to resume at a block's end."""
        return -(-(self.window - 1) // self.block_tokens)

    def open(
        self, token_ids: TokenIds, salt: str, num_prompt: int, reserve: int, reuses: bool = True
    ) -> Lease | None:
        """A lease for a sequence, with as much of its prefix as is cached; None while memory is short.

        token_ids: the tokens it has, of which at least the last is left to compute. num_prompt: how many of
        them are the prompt. reserve: full blocks that must stay available besides those the tokens need.
        """
        nodes, num_resumed = self._match(token_ids, salt) if reuses and self._reuses else ([], 0)
        width = self.full_block_SB.shape[1]
        num_needed = min(-(-(len(token_ids) + 1) // self.block_tokens), width) - num_resumed
        num_taken = sum(not self.full.is_used(node.full_block) for node in nodes[:num_resumed])
        if num_needed + num_taken + reserve > self.full.num_available or not self._rows:
            return None
        lease = Lease(self._rows.pop(), salt, is_chained=self._reuses)
        self._leases[lease.row] = lease
        lease.anchors.append((num_prompt - 1) // self.block_tokens)
        if len(nodes) > num_resumed:
            lease.anchors.append(len(nodes))
        if num_resumed:
            self._resume(lease, nodes[:num_resumed])
        if reuses and self._reuses and self._copier is not None:
            self._copy_part(self._copier, lease, token_ids, num_needed + reserve)
        return lease

    def _match(self, token_ids: TokenIds, salt: str) -> tuple[list[PrefixNode], int]:
        """(nodes whose full blocks are cached, how many of them can be resumed after)."""
        P = self.block_tokens
        nodes: list[PrefixNode] = []
        node: PrefixNode | None = None
        for i in range((len(token_ids) - 1) // P):
            node = self.index.find(node, salt, token_ids[i * P : (i + 1) * P].tobytes())
            if node is None:
                break
            nodes.append(node)
        needed = self.window_blocks_before
        for num_resumed in range(len(nodes), 0, -1):
            tail = nodes[max(0, num_resumed - needed) : num_resumed]
            if all(node.window_block != ABSENT for node in tail):
                return nodes, num_resumed
        return nodes, 0

    def _resume(self, lease: Lease, nodes: list[PrefixNode]) -> None:
        n = len(nodes)
        lease.nodes = nodes
        lease.num_blocks = n
        lease.num_computed = n * self.block_tokens
        lease.window_start = self._first_visible(lease.num_computed)
        for i, node in enumerate(nodes):
            self.full.share(node.full_block)
            self.full_block_SB[lease.row, i] = node.full_block
        for i in range(lease.window_start, n):
            self.windowed.share(nodes[i].window_block)
            self.window_block_SB[lease.row, i] = nodes[i].window_block

    def _copy_part(self, copier: BlockCopier, lease: Lease, token_ids: TokenIds, num_wanted: int) -> None:
        """Begin the next block with a copy of one that begins the same, if num_wanted blocks are left."""
        parent = lease.nodes[-1] if lease.nodes else None
        rest = token_ids[lease.num_computed : len(token_ids) - 1][: self.block_tokens]
        node, num_shared = self.index.nearest(parent, lease.salt, rest.tobytes())
        if node is None:
            return
        # Held, so that neither block is taken to make room for its copy.
        full, windowed = node.full_block, node.window_block
        self.full.share(full)
        self.windowed.share(windowed)
        if self.full.num_available >= num_wanted and self.windowed.num_available:
            targets = self.full.take(), self.windowed.take()
            copier.copy_block("full", full, targets[0])
            copier.copy_block("window", windowed, targets[1])
            self.full_block_SB[lease.row, lease.num_blocks] = targets[0]
            self.window_block_SB[lease.row, lease.num_blocks] = targets[1]
            lease.num_blocks += 1
            lease.num_computed += num_shared
        self.windowed.release(windowed)
        self.full.release(full)

    def _first_visible(self, position: int) -> int:
        """The first block that a window query at this position, or a later one, can see."""
        return max(0, position - self.window + 1) // self.block_tokens

    def extend(self, lease: Lease, num_tokens: int) -> int:
        """Take blocks for the next tokens of a sequence; how many of num_tokens there is room for."""
        end = lease.num_computed + num_tokens
        num_wanted = -(-end // self.block_tokens)
        num_new = min(num_wanted - lease.num_blocks, self.full.num_available, self.windowed.num_available)
        for i in range(lease.num_blocks, lease.num_blocks + num_new):
            self.full_block_SB[lease.row, i] = self.full.take()
            self.window_block_SB[lease.row, i] = self.windowed.take()
        lease.num_blocks += max(0, num_new)
        return min(end, lease.num_blocks * self.block_tokens) - lease.num_computed

    def room(self, lease: Lease) -> int:
        """Tokens that the lease's blocks have room for beyond those computed."""
        return lease.num_blocks * self.block_tokens - lease.num_computed

    def commit(self, lease: Lease, token_ids: TokenIds, num_tokens: int) -> None:
        """num_tokens more are computed: index the complete blocks, give back what left the window."""
        lease.num_computed += num_tokens
        while lease.is_chained and (len(lease.nodes) + 1) * self.block_tokens <= lease.num_computed:
            self._enter(lease, token_ids)
        start = self._first_visible(lease.num_computed)
        for i in range(lease.window_start, min(start, lease.num_blocks)):
            is_warm = any(anchor - self.window_blocks_before <= i < anchor for anchor in lease.anchors)
            if is_warm:
                self._save_window(lease, i)
            self.windowed.release(int(self.window_block_SB[lease.row, i]), is_warm)
            self.window_block_SB[lease.row, i] = ABSENT
        lease.window_start = start

    def _enter(self, lease: Lease, token_ids: TokenIds) -> None:
        """Put the next complete block into the index, or share the one that is there and free ours."""
        i, P = len(lease.nodes), self.block_tokens
        parent = lease.nodes[-1] if lease.nodes else None
        token_bytes = token_ids[i * P : (i + 1) * P].tobytes()
        full, windowed = int(self.full_block_SB[lease.row, i]), int(self.window_block_SB[lease.row, i])
        node = self.index.find(parent, lease.salt, token_bytes)
        if node is None:
            node = self.index.insert(parent, lease.salt, token_bytes, full, windowed)
            if node is None:
                lease.is_chained = False
                return
            self.full.node_of[full] = node
            self.windowed.node_of[windowed] = node
            if self._storage is not None:
                self._storage.save(node, "full")
        else:
            self.full.share(node.full_block)
            self.full.release(full)
            self.full_block_SB[lease.row, i] = node.full_block
            if node.window_block == ABSENT:
                node.window_block = windowed
                self.windowed.node_of[windowed] = node
            else:
                self.windowed.share(node.window_block)
                self.windowed.release(windowed)
                self.window_block_SB[lease.row, i] = node.window_block
        lease.nodes.append(node)

    def close(self, lease: Lease) -> None:
        """Give everything back. Last blocks first, so that a chain is forgotten from its end."""
        # The end of a chain is where its next turn resumes; what lies before left the window long ago.
        for i in range(
            max(lease.window_start, len(lease.nodes) - self.window_blocks_before), len(lease.nodes)
        ):
            self._save_window(lease, i)
        for i in range(lease.num_blocks - 1, -1, -1):
            self.full.release(int(self.full_block_SB[lease.row, i]))
            if i >= lease.window_start:
                self.windowed.release(int(self.window_block_SB[lease.row, i]))
        self.full_block_SB[lease.row, : lease.num_blocks] = ABSENT
        self.window_block_SB[lease.row, : lease.num_blocks] = ABSENT
        del self._leases[lease.row]
        self._rows.append(lease.row)

    def _save_window(self, lease: Lease, i: int) -> None:
        if self._storage is not None and i < len(lease.nodes) and lease.nodes[i].window_block != ABSENT:
            self._storage.save(lease.nodes[i], "window")

    def restore(self, token_ids: TokenIds, salt: str) -> bool:
        """Bring some of a prefix's stored blocks into the pools, as cached ones. True while more is to come.

        Only when the sequence could then resume further on than from what the pools hold.
        """
        if self._storage is None:
            return False
        nodes, num_resumed = self._match(token_ids, salt)
        end = self._resumable_end(nodes, self._stored_chain(nodes, token_ids, salt))
        if end <= num_resumed:
            return False
        for node in nodes:  # held, so that what comes takes none of their places
            self.full.share(node.full_block)
        stop = min(end, len(nodes) + RESTORED_AT_ONCE)
        is_whole = end - len(nodes) <= self.full.num_available
        while is_whole and len(nodes) < stop:
            is_whole = self._load_full(nodes, token_ids, salt)
        if is_whole and stop == end:
            is_whole = all(self._load_window(nodes[i]) for i in self._tail(end))
        for node in reversed(nodes):  # so that a chain is forgotten from its end
            self.full.release(node.full_block)
        return is_whole and stop < end

    def _tail(self, end: int) -> range:
        """The blocks whose window keys are needed to resume after `end` blocks."""
        return range(max(0, end - self.window_blocks_before), end)

    def _stored_chain(self, nodes: list[PrefixNode], token_ids: TokenIds, salt: str) -> list[bytes]:
        """Hashes of the nodes, and of the blocks behind them for as long as their full blocks are stored."""
        assert self._storage is not None
        P = self.block_tokens
        digests = [node.digest for node in nodes]
        before = digests[-1] if digests else salt_digest(salt)
        for i in range(len(nodes), (len(token_ids) - 1) // P):
            before = next_digest(before, token_ids[i * P : (i + 1) * P].tobytes())
            if not self._storage.has(before, "full"):
                break
            digests.append(before)
        return digests

    def _resumable_end(self, nodes: list[PrefixNode], digests: list[bytes]) -> int:
        """After how many blocks of the chain a sequence could resume, with what is cached and stored."""
        assert self._storage is not None
        for end in range(len(digests), 0, -1):
            if all(
                (i < len(nodes) and nodes[i].window_block != ABSENT)
                or self._storage.has(digests[i], "window")
                for i in self._tail(end)
            ):
                return end
        return 0

    def _load_full(self, nodes: list[PrefixNode], token_ids: TokenIds, salt: str) -> bool:
        """Load the block behind the nodes; its node is held and added to them."""
        assert self._storage is not None
        i, P = len(nodes), self.block_tokens
        parent = nodes[-1] if nodes else None
        before = parent.digest if parent is not None else salt_digest(salt)
        token_bytes = token_ids[i * P : (i + 1) * P].tobytes()
        block = self.full.take()
        node = None
        if self._storage.load(next_digest(before, token_bytes), before, token_bytes, "full", block):
            node = self.index.insert(parent, salt, token_bytes, block, ABSENT)
        if node is None:
            self.full.release(block)
            return False
        self.full.node_of[block] = node
        nodes.append(node)
        self.num_restored += 1
        return True

    def _load_window(self, node: PrefixNode) -> bool:
        assert self._storage is not None
        if node.window_block != ABSENT:
            return True
        if not self.windowed.num_available:
            return False
        block = self.windowed.take()
        is_loaded = node.window_block == ABSENT and self._storage.load(
            node.digest, node.parent_digest, node.token_bytes, "window", block
        )
        if is_loaded:
            node.window_block = block
            self.windowed.node_of[block] = node
        self.windowed.release(block)
        return is_loaded

    def _forget_node(self, node: PrefixNode) -> None:
        self.index.remove(node)
        if node.window_block != ABSENT:
            # Who holds a window block holds the full block too, so this one is cached.
            self.windowed.forget(node.window_block)
            node.window_block = ABSENT

    def _forget_window(self, node: PrefixNode) -> None:
        node.window_block = ABSENT

    def check(self) -> None:
        """Assert every invariant of the books. For tests: it looks at every block."""
        leases = self._leases.values()
        rows = [lease.row for lease in leases]
        assert sorted([*rows, *self._rows]) == list(range(len(self.full_block_SB))), "a table row is lost"
        for pool, table in ((self.full, self.full_block_SB), (self.windowed, self.window_block_SB)):
            pool.check(int(block) for block in table[table != ABSENT])
            assert (table[self._rows] == ABSENT).all(), "a free table row names blocks"
        for lease in leases:
            n, start = lease.num_blocks, lease.window_start
            full, windowed = self.full_block_SB[lease.row], self.window_block_SB[lease.row]
            assert (full[:n] != ABSENT).all() and (full[n:] == ABSENT).all(), "full blocks have a gap"
            assert (windowed[start:n] != ABSENT).all(), "a visible window block is missing"
            assert (windowed[:start] == ABSENT).all() and (windowed[n:] == ABSENT).all(), (
                "a window block is kept"
            )
            assert all(node in self.index for node in lease.nodes), "a held node left the index"
        nodes = [node for node in self.full.node_of if node is not None]
        assert len(nodes) == len(self.index), "a node without its block"
        for node in nodes:
            assert node in self.index and self.full.node_of[node.full_block] is node, (
                "a node's full block is another's"
            )
            assert node.parent is None or node.parent in self.index, "a node outlived its parent"
            assert node.window_block == ABSENT or self.windowed.node_of[node.window_block] is node
