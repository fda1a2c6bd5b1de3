from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonium.checkpoint.model_config import LayerKind
from harmonium.engine import prefix
from harmonium.engine.blocks import Lease, PagedCache, TokenIds
from tests.engine.serving import prompt_of

P = 32


class Copies:
    """What was copied."""

    def __init__(self) -> None:
        self.blocks: list[tuple[str, int, int]] = []

    def copy_block(self, kind: LayerKind, source: int, target: int) -> None:
        assert source != target
        self.blocks.append((kind, source, target))


def make_cache(
    num_full: int = 32,
    num_window: int = 32,
    window: int = 40,
    prefix_cache: bool = True,
    copier: Copies | None = None,
) -> PagedCache:
    return PagedCache(
        num_full,
        num_window,
        block_tokens=P,
        window=window,
        max_sequences=4,
        max_tokens=num_full * P,
        prefix_cache=prefix_cache,
        copier=copier,
    )


def ids(length: int, seed: int = 0) -> TokenIds:
    return np.array(prompt_of(length, seed), np.int32)


def compute(cache: PagedCache, lease: Lease, token_ids: TokenIds, chunk: int = 64) -> None:
    """Compute all that is left of token_ids."""
    while lease.num_computed < len(token_ids):
        num_tokens = cache.extend(lease, min(chunk, len(token_ids) - lease.num_computed))
        assert num_tokens > 0
        cache.commit(lease, token_ids, num_tokens)
        cache.check()


def open_lease(cache: PagedCache, token_ids: TokenIds, salt: str = "") -> Lease:
    lease = cache.open(token_ids, salt, len(token_ids), reserve=0)
    assert lease is not None
    cache.check()
    return lease


def serve(cache: PagedCache, token_ids: TokenIds, salt: str = "") -> int:
    """Compute a sequence and let it go; how many tokens were cached."""
    lease = open_lease(cache, token_ids, salt)
    num_cached = lease.num_computed
    compute(cache, lease, token_ids)
    cache.close(lease)
    cache.check()
    return num_cached


def test_free_cached_used_make_all() -> None:
    cache = make_cache()
    serve(cache, ids(100))
    assert (cache.full.num_free, cache.full.num_cached, cache.full.num_used) == (29, 3, 0)
    lease = open_lease(cache, ids(100))
    assert (cache.full.num_cached, cache.full.num_used) == (0, 3)
    cache.close(lease)


def test_blocks_that_left_the_window_are_given_back_and_marked() -> None:
    cache = make_cache(window=40, prefix_cache=False)
    lease = open_lease(cache, ids(200))
    compute(cache, lease, ids(200))
    # A query at 200 sees 161 to 200: blocks 5 and 6.
    assert (cache.window_block_SB[lease.row, :5] == -1).all()
    assert (cache.window_block_SB[lease.row, 5:7] >= 0).all()
    assert (cache.full_block_SB[lease.row, :7] >= 0).all()
    assert (cache.full.num_used, cache.windowed.num_used) == (7, 2)


def test_same_block_computed_twice_is_kept_once() -> None:
    cache = make_cache()
    first, second = open_lease(cache, ids(96)), open_lease(cache, ids(96))
    compute(cache, first, ids(96))
    compute(cache, second, ids(96))
    assert cache.full.num_used == 3
    assert (cache.full_block_SB[first.row] == cache.full_block_SB[second.row]).all()


def test_resumption_needs_the_window_before_it() -> None:
    cache = make_cache(window=40)
    serve(cache, ids(320))
    # Window blocks 8 and 9 end the prompt; to resume at 288 blocks 7 and 8 would be needed too.
    for node in cache.full.node_of:
        if (
            node is not None
            and node.window_block != -1
            and node.token_bytes == ids(320)[8 * P : 9 * P].tobytes()
        ):
            cache.windowed.forget(node.window_block)
            node.window_block = -1
    cache.check()
    lease = open_lease(cache, ids(320))
    assert lease.num_computed == 8 * P
    compute(cache, lease, ids(320))


def test_end_of_a_prompt_stays_resumable_when_window_blocks_are_scarce() -> None:
    cache = make_cache(64, 12, window=40)
    chat = ids(200)
    answered = np.concatenate([chat, ids(600, 1)])
    lease = cache.open(answered, "", len(chat), reserve=0)
    assert lease is not None
    compute(cache, lease, answered)
    cache.close(lease)
    assert serve(cache, np.concatenate([chat, ids(60, 2)])) == 192


def test_least_recently_used_chain_is_forgotten_first_and_from_its_end() -> None:
    cache = make_cache(num_full=12, num_window=12)
    serve(cache, ids(128, 1))
    serve(cache, ids(128, 2))
    assert serve(cache, ids(128, 1)) == 96
    # Eight blocks are cached, four free; six more are wanted: two of the chain that was used longest ago.
    serve(cache, ids(192, 3))
    lease = open_lease(cache, ids(128, 2))
    assert lease.num_computed == 64
    cache.close(lease)
    assert serve(cache, ids(128, 1)) == 96


def test_salts_never_meet() -> None:
    cache = make_cache()
    serve(cache, ids(100), "a")
    assert serve(cache, ids(100), "b") == 0
    assert serve(cache, ids(100), "a") == 96


def test_colliding_hashes_never_share_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "chain_digest", lambda parent, salt, token_bytes: token_bytes[:4])
    cache = make_cache()
    one, other = ids(100), ids(100)
    other[5] += 1  # the first four bytes, so the "hash", stay the same
    serve(cache, one)
    assert serve(cache, other) == 0
    assert serve(cache, one) == 96
    # Another chain before the same tokens.
    assert serve(cache, np.concatenate([other[:32], one[32:]])) == 0


def test_open_refuses_what_does_not_fit_beside_the_reserve() -> None:
    cache = make_cache(num_full=8)
    assert cache.open(ids(128), "", 128, reserve=4) is None
    lease = cache.open(ids(127), "", 127, reserve=4)
    assert lease is not None
    compute(cache, lease, ids(127))
    cache.close(lease)
    other = open_lease(cache, ids(127, 1))
    compute(cache, other, ids(127, 1))
    # One block is free, three are cached: to share the three and take two more is one too many.
    assert cache.open(np.concatenate([ids(127), ids(20, 1)]), "", 147, reserve=0) is None
    assert cache.open(ids(127), "", 127, reserve=0) is not None
    cache.check()


def test_extend_stops_where_blocks_do() -> None:
    cache = make_cache(num_full=8, num_window=3)
    lease = open_lease(cache, ids(200))
    assert cache.extend(lease, 200) == 96
    cache.check()
    cache.commit(lease, ids(200), 96)
    assert cache.extend(lease, 104) == 32
    cache.commit(lease, ids(200), 32)
    cache.check()


def test_check_sees_a_lost_block() -> None:
    cache = make_cache()
    lease = open_lease(cache, ids(40))
    compute(cache, lease, ids(40))
    cache.full_block_SB[lease.row, 0] = 31
    with pytest.raises(AssertionError):
        cache.check()


def test_a_prompt_seen_before_computes_its_last_token_alone() -> None:
    copies = Copies()
    cache = make_cache(copier=copies)
    for length in (96, 75):  # to the end of a block, and within one that the answer filled
        token_ids = ids(130, length)
        assert serve(cache, token_ids) == 0
        copies.blocks.clear()
        lease = open_lease(cache, token_ids[:length])
        assert lease.num_computed == length - 1
        n = lease.num_blocks - 1
        assert [kind for kind, _, _ in copies.blocks] == ["full", "window"]
        assert copies.blocks[0][2] == cache.full_block_SB[lease.row, n]
        assert copies.blocks[1][2] == cache.window_block_SB[lease.row, n]
        compute(cache, lease, token_ids[:length])
        cache.close(lease)


def test_a_prompt_that_parts_within_a_block_takes_what_is_common() -> None:
    cache = make_cache(copier=Copies())
    serve(cache, ids(100))
    other = np.concatenate([ids(75), ids(60, 1)])
    assert serve(cache, other) == 75
    assert serve(cache, other, "another salt") == 0
    first = np.concatenate([ids(9), ids(60, 1)])
    assert serve(cache, first) == 9  # from the first block on
    nearest = np.concatenate([ids(75), ids(10, 1), ids(60, 2)])
    assert serve(cache, nearest) == 85  # of two blocks there the one that has more in common


def test_nothing_is_copied_where_blocks_are_few() -> None:
    copies = Copies()
    cache = make_cache(4, copier=copies)
    serve(cache, ids(100))
    held = open_lease(cache, ids(32, 5))
    compute(cache, held, ids(32, 5))
    before = cache.full.num_available
    lease = cache.open(np.concatenate([ids(75), ids(20, 1)]), "", 95, reserve=before - 2)
    assert lease is None or lease.num_computed % P == 0
    assert not copies.blocks


STEPS = st.lists(
    st.tuples(st.sampled_from(["open", "step", "close"]), st.integers(0, 3), st.integers(1, 70)), max_size=60
)


@settings(max_examples=150, deadline=None)
@given(
    steps=STEPS,
    window=st.sampled_from([1, 8, 33, 70]),
    num_window=st.integers(4, 12),
    prefix_cache=st.booleans(),
    copies=st.booleans(),
)
def test_books_balance_after_any_operations(
    steps: list[tuple[str, int, int]], window: int, num_window: int, prefix_cache: bool, copies: bool
) -> None:
    cache = make_cache(10, num_window, window, prefix_cache, Copies() if copies else None)
    held: dict[int, tuple[Lease, TokenIds]] = {}
    for what, which, amount in steps:
        if what == "open" and which not in held:
            # Few prompts that part at different places: chains are shared, evicted, computed again.
            token_ids = np.concatenate([ids(amount), ids(130, amount % 3)])
            lease = cache.open(token_ids, str(amount % 2), len(token_ids), reserve=0)
            if lease is not None:
                held[which] = (lease, token_ids)
        elif what == "step" and which in held:
            lease, token_ids = held[which]
            wanted = min(amount, len(token_ids) - lease.num_computed)
            num_tokens = cache.extend(lease, wanted)
            assert 0 <= num_tokens <= wanted
            cache.check()
            cache.commit(lease, token_ids, num_tokens)
        elif what == "close" and which in held:
            cache.close(held.pop(which)[0])
        cache.check()
    for lease, _ in held.values():
        cache.close(lease)
    cache.check()
    assert cache.full.num_used == cache.windowed.num_used == 0
