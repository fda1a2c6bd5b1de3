"""Which token blocks the cache knows: a chain of hashes, each over its parent's hash and one block's token
ids.

A hash only finds a candidate. The candidate is used after its parent, its salt and its token ids have been
compared, so two prompts whose hashes collide never read each other's keys and values.
"""

from __future__ import annotations

from hashlib import blake2b
from itertools import islice

import numpy as np

DIGEST_BYTES = 16

CHILDREN_COMPARED = 64
"""Blocks behind one block that are compared with a prompt's next tokens: the latest ones."""


class PrefixNode:
    """One complete block of tokens at one place in a chain, and the cache blocks that hold its keys and
    values.

    parent: the block before it, None for a first block. salt: chains with different salts never meet.
    token_bytes: the block's token ids, int32. full_block: block of the full-attention pool; a node lives as
    long as that block does. window_block: block of the window pool, -1 when it has been given away.
    """

    __slots__ = ("digest", "full_block", "parent", "salt", "token_bytes", "window_block")

    def __init__(
        self,
        digest: bytes,
        parent: PrefixNode | None,
        salt: str,
        token_bytes: bytes,
        full_block: int,
        window_block: int,
    ) -> None:
        self.digest = digest
        self.parent = parent
        self.salt = salt
        self.token_bytes = token_bytes
        self.full_block = full_block
        self.window_block = window_block

    @property
    def parent_digest(self) -> bytes:
        """The parent's hash, the salt's for a first block."""
        return self.parent.digest if self.parent is not None else salt_digest(self.salt)

    def holds(self, parent: PrefixNode | None, salt: str, token_bytes: bytes) -> bool:
        """Whether this is that block and no other of the same hash."""
        return self.parent is parent and self.token_bytes == token_bytes and self.salt == salt


def chain_digest(parent: PrefixNode | None, salt: str, token_bytes: bytes) -> bytes:
    """Hash of a block: over its parent's hash (over the salt, for a first block) and its token ids."""
    before = parent.digest if parent is not None else salt_digest(salt)
    return next_digest(before, token_bytes)


def salt_digest(salt: str) -> bytes:
    """What stands for the parent of a first block."""
    return blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()


def next_digest(before: bytes, token_bytes: bytes) -> bytes:
    """Hash of a block behind another of that hash."""
    return blake2b(before + token_bytes, digest_size=DIGEST_BYTES).digest()


class PrefixIndex:
    """All nodes by their hash."""

    def __init__(self) -> None:
        self._node_of: dict[bytes, PrefixNode] = {}
        self._children_of: dict[bytes, dict[bytes, PrefixNode]] = {}

    def __len__(self) -> int:
        return len(self._node_of)

    def __contains__(self, node: PrefixNode) -> bool:
        return self._node_of.get(node.digest) is node

    def find(self, parent: PrefixNode | None, salt: str, token_bytes: bytes) -> PrefixNode | None:
        """The node that holds exactly this block in this chain, or None."""
        node = self._node_of.get(chain_digest(parent, salt, token_bytes))
        return node if node is not None and node.holds(parent, salt, token_bytes) else None

    def insert(
        self, parent: PrefixNode | None, salt: str, token_bytes: bytes, full_block: int, window_block: int
    ) -> PrefixNode | None:
        """Add a block that `find` did not find. None when another block of the same hash is in its place."""
        digest = chain_digest(parent, salt, token_bytes)
        if digest in self._node_of:
            return None
        node = PrefixNode(digest, parent, salt, token_bytes, full_block, window_block)
        self._node_of[digest] = node
        self._children_of.setdefault(node.parent_digest, {})[digest] = node
        return node

    def nearest(
        self, parent: PrefixNode | None, salt: str, token_bytes: bytes
    ) -> tuple[PrefixNode | None, int]:
        """The block behind `parent`, with both its cache blocks there, that begins as these tokens do (fewer
        than a block or as many), and how many tokens they share; (None, 0) where none shares one.
        """
        wanted = np.frombuffer(token_bytes, np.int32)
        best: PrefixNode | None = None
        most = 0
        before = parent.digest if parent is not None else salt_digest(salt)
        for node in islice(reversed(self._children_of.get(before, {}).values()), CHILDREN_COMPARED):
            if node.parent is not parent or node.salt != salt or node.window_block < 0:
                continue
            held = np.frombuffer(node.token_bytes, np.int32)[: wanted.size]
            differs = np.flatnonzero(held != wanted[: held.size])
            num_shared = int(differs[0]) if differs.size else held.size
            if num_shared > most:
                best, most = node, num_shared
        return best, most

    def remove(self, node: PrefixNode) -> None:
        """Take out a node that is in."""
        del self._node_of[node.digest]
        siblings = self._children_of[node.parent_digest]
        del siblings[node.digest]
        if not siblings:
            del self._children_of[node.parent_digest]
