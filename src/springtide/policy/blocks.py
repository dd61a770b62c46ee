"""How many blocks of KV memory are free. Counts only: which pages a block is, the engine knows."""

from __future__ import annotations


class BlockPool:
    """A number of blocks of `block_size` tokens each, some of them taken."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_free = num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def take(self, count: int) -> None:
        assert 0 <= count <= self.num_free, f"{count} blocks taken of {self.num_free} free ones"
        self.num_free -= count

    def give_back(self, count: int) -> None:
        assert 0 <= count <= self.num_blocks - self.num_free, f"{count} blocks given back that nobody took"
        self.num_free += count
