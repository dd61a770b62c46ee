"""The block pool: who holds what, and what can still be found."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from springtide.policy.blocks import BlockPool


def hashed(pool: BlockPool, *hashes: bytes) -> list[int]:
    """Blocks taken and registered under these hashes, as a sequence does that computes them."""
    blocks = pool.take(len(hashes))
    for block, name in zip(blocks, hashes, strict=True):
        pool.register(block, name)
    return blocks


def test_blocks_without_a_hash_are_reused_before_untouched_ones() -> None:
    pool = BlockPool(4, 16)
    assert pool.take(2) == [0, 1]
    pool.give_back([0, 1])
    assert pool.take(3) == [0, 1, 2]


def test_a_freed_block_is_found_until_it_is_handed_out_anew() -> None:
    pool = BlockPool(3, 16)
    blocks = hashed(pool, b"a", b"b")
    pool.give_back(blocks)
    assert pool.num_free == 3
    assert pool.find([b"a", b"b", b"c"]) == blocks
    assert pool.take(1) == [2], "it is blank, and costs the cache nothing"
    assert pool.take(1) == [blocks[1]], "the tail goes before the head"
    assert pool.find([b"a", b"b"]) == blocks[:1]
    assert pool.take(1) == [blocks[0]]
    assert pool.find([b"a"]) == []


def test_the_least_recently_used_prefix_goes_first() -> None:
    pool = BlockPool(2, 16)
    old, young = hashed(pool, b"old"), hashed(pool, b"young")
    pool.give_back(old)
    pool.give_back(young)
    pool.share(old)
    pool.give_back(old)
    assert pool.take(1) == young


def test_a_shared_block_is_free_when_its_last_holder_leaves() -> None:
    pool = BlockPool(2, 16)
    blocks = hashed(pool, b"a")
    pool.share(blocks)
    pool.give_back(blocks)
    assert pool.num_free == 1
    assert pool.num_held(blocks) == 1
    pool.give_back(blocks)
    assert pool.num_free == 2
    assert pool.num_held(blocks) == 0


def test_of_two_blocks_with_the_same_hash_the_first_is_found_and_the_other_is_private() -> None:
    pool = BlockPool(2, 16)
    first, second = hashed(pool, b"a"), hashed(pool, b"a")
    assert pool.find([b"a"]) == first
    with pytest.raises(AssertionError, match="may still be written"):
        pool.share(second)
    pool.give_back(second)
    assert pool.take(1) == second, "it is blank"


def test_a_prefix_ends_at_its_first_gap() -> None:
    pool = BlockPool(3, 16)
    blocks = hashed(pool, b"a", b"c")
    assert pool.find([b"a", b"b", b"c"]) == blocks[:1]
    assert pool.num_registered([b"a", b"b", b"c"]) == 2


def test_what_nobody_holds_cannot_be_given_back_or_registered_and_what_is_not_there_cannot_be_taken() -> None:
    pool = BlockPool(2, 16)
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.give_back([0])
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.register(0, b"a")
    with pytest.raises(AssertionError, match="3 blocks taken of 2"):
        pool.take(3)


class PoolAgainstModel(RuleBasedStateMachine):
    """The pool against lists that are searched: what is held, what is blank, what is cached in which order."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, 16)
        self.held: list[int] = []  # one entry for each holder
        self.names: dict[int, bytes] = {}
        self.cached: list[int] = []  # the first goes first

    @rule(target=tables, count=st.integers(0, 3))
    def take(self, count: int) -> list[int]:
        count = min(count, self.pool.num_free)
        num_blank = self.pool.num_free - len(self.cached)
        expected = self.cached[: max(0, count - num_blank)]
        blocks = self.pool.take(count)
        assert not set(blocks) & set(self.held)
        assert [block for block in blocks if block in self.cached] == expected
        for block in expected:
            self.cached.remove(block)
            del self.names[block]
        self.held += blocks
        return blocks

    @rule(table=tables, name=st.sampled_from([b"a", b"b", b"c"]))
    def register(self, table: list[int], name: bytes) -> None:
        for block in table[:1]:
            if block in self.held and block not in self.names:
                self.pool.register(block, name)
                if name not in self.names.values():
                    self.names[block] = name

    @rule(target=tables, names=st.lists(st.sampled_from([b"a", b"b", b"c"]), unique=True))
    def share(self, names: list[bytes]) -> list[int]:
        blocks = self.pool.find(names)
        assert [self.names[block] for block in blocks] == names[: len(blocks)]
        self.pool.share(blocks)
        self.cached = [block for block in self.cached if block not in blocks]
        self.held += blocks
        return blocks

    @rule(table=consumes(tables))
    def give_back(self, table: list[int]) -> None:
        self.pool.give_back(table)
        for block in reversed(table):
            self.held.remove(block)
            if block not in self.held and block in self.names:
                self.cached.append(block)

    @invariant()
    def counts_agree(self) -> None:
        assert self.pool.num_free == 6 - len(set(self.held))
        assert self.pool.num_held(range(6)) == len(set(self.held))
        assert self.pool.num_registered([b"a", b"b", b"c"]) == len(self.names)


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
