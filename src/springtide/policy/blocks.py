"""Which blocks of KV memory are free, who shares them, and which of them a hash finds. Knows ids and counts: not
what is in a block, nor where it lies.

A block is held by the sequences that have it in their block table, or it is free. A block whose tokens are computed
can be registered under the hash of its prefix (`springtide.policy.prefix`). It then stays findable when nobody holds
it any more, until it is handed out anew: the prefix cache is nothing but the free blocks' memory of what they were.
So a cached block costs nobody anything, and counts as free.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks [0, num_blocks) of `block_size` tokens each.

    Free blocks without a hash are handed out first, the latest freed before those that were never used: that keeps
    memory warm, and small. Then those with a hash, the least recently used first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_holders = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # free, without a hash; the last one goes first
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, with a hash; the first one goes first
        self._hash_of: dict[int, bytes] = {}  # of registered blocks, held and free
        self._block_of: dict[bytes, int] = {}  # the reverse

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones included."""
        return len(self._blank) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def take(self, count: int) -> list[int]:
        """Hand out `count` free blocks; what they held is forgotten."""
        assert 0 <= count <= self.num_free, f"{count} blocks taken of {self.num_free} free ones"
        return [self._hand_out() for _ in range(count)]

    def share(self, blocks: Iterable[int]) -> None:
        """One holder more for registered blocks, free or held."""
        for block in blocks:
            assert block in self._hash_of, f"block {block} can't be shared: it may still be written"
            self._num_holders[block] += 1
            self._cached.pop(block, None)

    def give_back(self, blocks: Sequence[int]) -> None:
        """One holder less for blocks of one sequence, in the order of its tokens. Those that nobody holds now are
        free; the last one will go first, since a prefix is worth nothing without its head."""
        for block in reversed(blocks):
            assert self._num_holders[block], f"block {block} given back, but nobody holds it"
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._blank.append(block)

    def register(self, block: int, block_hash: bytes) -> None:
        """Let a held block, all of whose tokens are computed, be found by its hash. If another block has that hash
        already, this one stays private."""
        assert self._num_holders[block], f"block {block} is registered, but nobody holds it"
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def find(self, block_hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest prefix of which all are registered."""
        blocks = []
        for block_hash in block_hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_registered(self, block_hashes: Iterable[bytes]) -> int:
        """How many of these hashes find a block."""
        return sum(block_hash in self._block_of for block_hash in block_hashes)

    def num_held(self, blocks: Iterable[int], leaving: Counter[int] | None = None) -> int:
        """How many of these somebody holds, once as many holders as `leaving` counts for each block are gone."""
        if not leaving:
            return sum(self._num_holders[block] > 0 for block in blocks)
        return sum(self._num_holders[block] > leaving[block] for block in blocks)

    def _hand_out(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._num_holders[block] = 1
        return block
