"""Pages are handed out once, found through the table, and come back."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.engine.kv import PAGE_SIZE, PagePool, PageTable

LAYERS, HEADS = 3, 2


def pages_of(table: PageTable, row: int, num_tokens: int) -> np.ndarray:
    return table.tensor[row, :, :, : -(-num_tokens // PAGE_SIZE)].numpy()


def test_a_block_is_one_page_of_each_layer_and_head() -> None:
    table = PageTable(num_blocks=4, max_num_seqs=2, num_layers=LAYERS, num_kv_heads=HEADS)
    row = table.extend("a", PAGE_SIZE + 1)
    pages = pages_of(table, row, PAGE_SIZE + 1)
    assert pages.shape == (LAYERS, HEADS, 2)
    assert sorted(pages.flatten()) == list(range(2 * LAYERS * HEADS))


def test_a_long_sequence_widens_the_table_and_keeps_its_pages() -> None:
    table = PageTable(num_blocks=100, max_num_seqs=2, num_layers=LAYERS, num_kv_heads=HEADS)
    row = table.extend("a", 40)
    before = pages_of(table, row, 40).copy()
    assert table.extend("a", 1500) == row
    assert (pages_of(table, row, 40) == before).all()
    assert table.tensor.is_contiguous()


def test_memory_that_nobody_wrote_costs_nothing() -> None:
    before = resident_memory()
    pool = PagePool(num_blocks=10_000, num_layers=4, num_kv_heads=4, head_dim=64, dtype=torch.bfloat16)
    assert pool.k.nbytes + pool.v.nbytes > 600_000_000
    assert resident_memory() - before < 50_000_000
    assert not pool.k[-1].any()


def resident_memory() -> int:
    """Bytes of this process in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 120)), max_size=30))
def test_no_page_ever_belongs_to_two_sequences(events: Any) -> None:
    table = PageTable(num_blocks=32, max_num_seqs=4, num_layers=LAYERS, num_kv_heads=HEADS)
    rows: dict[str, int] = {}
    lengths: dict[str, int] = {}
    for name, length in events:
        if length == 0:
            table.release(name)
            rows.pop(name, None)
            lengths.pop(name, None)
        else:
            lengths[name] = max(length, lengths.get(name, 0))
            rows[name] = table.extend(name, length)
        held = [pages_of(table, rows[name], lengths[name]).flatten() for name in rows]
        pages = np.concatenate(held) if held else np.array([])
        assert len(set(pages.tolist())) == len(pages)
        assert table.num_free_blocks == 32 - len(pages) // (LAYERS * HEADS)
        assert len(set(rows.values())) == len(rows)
