"""Pages are found through the table, wherever the scheduler put them."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.engine.kv import PagePool, PageTable

LAYERS, HEADS = 3, 2


def new_table() -> PageTable:
    return PageTable(max_num_seqs=4, num_layers=LAYERS, num_kv_heads=HEADS)


def blocks_of(table: PageTable, row: int, num_blocks: int) -> list[int]:
    """Read back from the pages: those of a block lie together, layer by layer."""
    pages = table.tensor[row, :, :, :num_blocks].numpy()
    blocks = pages[0, 0] // (LAYERS * HEADS)
    assert (pages == blocks * LAYERS * HEADS + np.arange(LAYERS * HEADS).reshape(LAYERS, HEADS, 1)).all()
    return blocks.tolist()


def test_a_block_is_one_page_of_each_layer_and_head() -> None:
    table = new_table()
    row = table.append("a", [3, 0], 2)
    assert blocks_of(table, row, 2) == [3, 0]
    assert sorted(table.tensor[row, :, :, :2].flatten().tolist()) == [*range(6), *range(18, 24)]


def test_a_long_sequence_widens_the_table_and_keeps_its_pages() -> None:
    table = new_table()
    first = [7, 5, 6]
    row = table.append("a", first, 3)
    more = list(range(10, 100))
    assert table.append("a", more, 93) == row
    assert blocks_of(table, row, 93) == first + more
    assert table.tensor.is_contiguous()


def test_what_a_rejected_draft_had_is_written_over() -> None:
    table = new_table()
    row = table.append("a", [1, 2, 3], 3)
    assert table.append("a", [], 1) == row  # the scheduler took two blocks back
    table.append("a", [9], 2)
    assert blocks_of(table, row, 2) == [1, 9]


def test_sequences_may_share_blocks() -> None:
    table = new_table()
    a, b = table.append("a", [1, 2], 2), table.append("b", [1, 3], 2)
    assert a != b
    assert (blocks_of(table, a, 2), blocks_of(table, b, 2)) == ([1, 2], [1, 3])


def test_memory_that_nobody_wrote_costs_nothing() -> None:
    before = resident_memory()
    pool = PagePool(num_blocks=10_000, num_layers=4, num_kv_heads=4, head_dim=64, dtype=torch.bfloat16)
    assert pool.k.nbytes + pool.v.nbytes > 600_000_000
    assert resident_memory() - before < 50_000_000
    assert not pool.k[-1].any()


def resident_memory() -> int:
    """Bytes of this process in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


Event = tuple[
    str, int, Sequence[int]
]  # who; how many of its blocks stay, of those it has; which it gains (none: leave)
events = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(0, 20), st.lists(st.integers(0, 31), max_size=12)), max_size=30
)


@settings(max_examples=60, deadline=None)
@given(events)
def test_every_sequence_finds_its_blocks_whatever_the_others_do(events: list[Event]) -> None:
    table = new_table()
    expected: dict[str, list[int]] = {}
    rows: dict[str, int] = {}
    for name, kept, gained in events:
        if not gained:
            table.release(name)
            expected.pop(name, None)
            rows.pop(name, None)
        else:
            expected[name] = [*expected.get(name, [])[:kept], *gained]
            rows[name] = table.append(name, gained, len(expected[name]))
        assert len(set(rows.values())) == len(rows)
        for known, blocks in expected.items():
            assert blocks_of(table, rows[known], len(blocks)) == blocks
