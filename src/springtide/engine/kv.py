"""KV memory of one device: the pages, and where each sequence finds its own. Knows no models and no scheduling: who
may have which block, the scheduler says.

A page holds 16 tokens of one KV head of one layer. A block is the pages of the same 16 tokens over all layers
and heads. Sequences grow by whole blocks here, but attention only ever reads the page table, so that a cache
that keeps a different number of tokens in each head needs no other kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

PAGE_SIZE = 16
_CACHE_LINE = 64


def block_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of K and V for 16 tokens over all layers and heads."""
    return 2 * num_layers * num_kv_heads * PAGE_SIZE * head_dim * dtype.itemsize


class PagePool:
    """K and V of every page, zero at first. Pages that nobody has written yet cost no RAM."""

    def __init__(self, num_blocks: int, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        shape = (num_blocks * num_layers * num_kv_heads, PAGE_SIZE, head_dim)
        self.num_blocks = num_blocks
        self.k = _untouched_zeros(shape, dtype)  # [pages, 16, head_dim]
        self.v = _untouched_zeros(shape, dtype)  # [pages, 16, head_dim]


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros as the system hands them out, on first touch; `torch.zeros` would write, and so take, all of it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + _CACHE_LINE, dtype=np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)


class PageTable:
    """Which pages hold each running sequence: one row a sequence, extended in place as it grows.

    A row's entries past the sequence's last page are stale, and rows without a sequence are too: readers stop
    at a row's position. Block `b` holds pages [b * layers * heads, (b + 1) * layers * heads), layer by layer.
    Sequences may have blocks in common.
    """

    def __init__(self, max_num_seqs: int, num_layers: int, num_kv_heads: int) -> None:
        self._pages_per_block = num_layers * num_kv_heads
        self._offsets = np.arange(self._pages_per_block, dtype=np.int32).reshape(num_layers, num_kv_heads, 1)
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._rows: dict[str, int] = {}
        self._allocate(np.zeros((max_num_seqs, num_layers, num_kv_heads, 8), dtype=np.int32))

    def _allocate(self, table: np.ndarray) -> None:
        self._table = table
        self.tensor = torch.from_numpy(table)  # int32 [seqs, layers, kv_heads, pages], the same memory

    def append(self, sequence_id: str, blocks: Sequence[int], num_blocks: int) -> int:
        """Let a sequence, new or known, go on in `blocks`, the last ones of `num_blocks` that it now has; what stood
        in their place is forgotten. Its row in the table."""
        row = self._rows.get(sequence_id)
        if row is None:
            row = self._rows[sequence_id] = self._free_rows.pop()
        if blocks:
            self._widen(num_blocks)
            first_pages = np.array(blocks, dtype=np.int32) * self._pages_per_block
            self._table[row, :, :, num_blocks - len(blocks) : num_blocks] = first_pages + self._offsets
        return row

    def release(self, sequence_id: str) -> None:
        """Take a sequence's row back. One that never ran has none."""
        if sequence_id in self._rows:
            self._free_rows.append(self._rows.pop(sequence_id))

    def _widen(self, num_pages: int) -> None:
        """At least `num_pages` entries a row: the length doubles, so that growing is rare."""
        seqs, layers, heads, width = self._table.shape
        if num_pages <= width:
            return
        wider = np.zeros((seqs, layers, heads, max(num_pages, 2 * width)), dtype=np.int32)
        wider[..., :width] = self._table
        self._allocate(wider)
