"""Which upstream a prompt goes to."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from harmonium.engine.balance import BLOCK_TOKENS, Balancer, prefix_hashes
from harmonium.engine.http_exchange import parse_address
from harmonium.engine.upstream import Upstream


def upstreams(count: int) -> list[Upstream]:
    return [Upstream(parse_address(f"http://host{number}:8000"), is_up=True) for number in range(count)]


class Chooser:
    """A balancer of some upstreams."""

    def __init__(self, some: list[Upstream]) -> None:
        self.upstreams = some
        self.balancer = Balancer()

    def choose(self, tokens: Sequence[int], salt: str, without: Sequence[Upstream]) -> Upstream | None:
        return self.balancer.choose(self.upstreams, prefix_hashes(tokens, salt), without)


def prompt(seed: int, length: int = 500) -> list[int]:
    return random.Random(seed).choices(range(200_000), k=length)


def test_conversation_stays_where_it_began_however_long_it_gets() -> None:
    balancer = Chooser(upstreams(8))
    for seed in range(20):
        tokens = prompt(seed, 150)
        first = balancer.choose(tokens, "", ())
        for length in (250, 400, 700, 1300):
            tokens = [*tokens, *prompt(seed + 1000, length - len(tokens))]
            assert balancer.choose(tokens, "", ()) is first


def test_prompts_of_one_beginning_meet_and_others_spread() -> None:
    balancer = Chooser(upstreams(8))
    shared = prompt(0, 4 * BLOCK_TOKENS)
    assert len({balancer.choose([*shared, *prompt(seed)], "", ()) for seed in range(1, 30)}) == 1
    spread = Counter(balancer.choose(prompt(seed), "", ()) for seed in range(800))
    assert len(spread) == 8 and min(spread.values()) > 50


def test_what_all_prompts_begin_with_does_not_gather_them() -> None:
    balancer = Chooser(upstreams(4))
    system = prompt(0, 2 * BLOCK_TOKENS)
    found = {balancer.choose([*system, *prompt(seed, 1000)], "", ()) for seed in range(1, 100)}
    assert len(found) == 4


def test_busy_upstream_is_passed_over() -> None:
    balancer = Chooser(upstreams(3))
    wanted = balancer.choose(prompt(1), "", ())
    assert wanted is not None
    wanted.running = 10
    other = balancer.choose(prompt(1), "", ())
    assert other is not None and other is not wanted


def test_another_salt_shares_nothing() -> None:
    assert not set(prefix_hashes(prompt(1), "a")) & set(prefix_hashes(prompt(1), "b"))


def test_only_those_that_are_up_rested_and_untried_are_chosen() -> None:
    first, second, third = all_three = upstreams(3)
    balancer = Chooser(all_three)
    first.eject("gone")
    second.rest(60)
    for seed in range(20):
        assert balancer.choose(prompt(seed), "", ()) is third
        assert balancer.choose(prompt(seed), "", [third]) is second
        assert balancer.choose(prompt(seed), "", [second, third]) is None


def test_when_one_goes_the_prompts_of_others_stay() -> None:
    some = upstreams(5)
    before = {seed: Chooser(some).choose(prompt(seed), "", ()) for seed in range(200)}
    some[0].eject("gone")
    for seed, upstream in before.items():
        after = Chooser(some).choose(prompt(seed), "", ())
        assert after is upstream if upstream is not some[0] else after is not some[0]


def test_short_and_empty_prompts_have_a_place() -> None:
    balancer = Chooser(upstreams(2))
    assert balancer.choose([], "", ()) is balancer.choose([], "", ())
    assert balancer.choose([1], "", ()) is not None


def test_a_prompt_that_went_elsewhere_is_looked_for_there() -> None:
    some = upstreams(5)
    for seed in range(20):
        balancer, blocks = Balancer(), prefix_hashes(prompt(seed), "")
        balancer.remember(blocks, some[3].name)
        assert balancer.choose(some, blocks, ()) is some[3]


def test_a_newcomer_may_be_chosen_and_one_that_has_gone_is_forgotten() -> None:
    balancer, some = Balancer(), upstreams(3)
    before = {seed: balancer.choose(some[:2], prefix_hashes(prompt(seed), ""), ()) for seed in range(60)}
    for seed, upstream in before.items():
        assert balancer.choose(some, prefix_hashes(prompt(seed), ""), ()) is upstream
    newcomers = [balancer.choose(some, prefix_hashes(prompt(seed), ""), ()) for seed in range(60, 120)]
    assert some[2] in newcomers
    for seed in before:
        assert balancer.choose(some[1:], prefix_hashes(prompt(seed), ""), ()) in some[1:]
