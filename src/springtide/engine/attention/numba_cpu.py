"""Paged attention on CPU, compiled by Numba: ragged rows, grouped heads, float32 or bfloat16 pages.

A row's arithmetic is fixed by its own position and the layer's window: a score is summed along the head in
order, the softmax goes over chunks of four pages counted from position 0, values are added token by token. Which
rows share the call, how a prompt was chunked, and how many threads run do not enter into it. Pages that no row of
a call sees are not read, and need not be there.

Inside a page, keys are stored transposed, [head_dim, 16]: the scores of a page then are one vector, and no sum
runs across its lanes.
"""
# Numba infers the types of kernels:
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from springtide.engine.attention.base import PAGE_SIZE, AttentionLayer, Pages
from springtide.engine.inputs import ForwardInputs
from springtide.engine.jit import FASTMATH, FUSED, LOG2_E, as_numpy, exp2, from_f32, launch, njit, prange, to_f32
from springtide.engine.simd import LANES, add_product, load, store, zeros

DTYPES = (torch.float32, torch.bfloat16)

_CHUNK_PAGES = 4  # pages between two rescalings of the running softmax
_CHUNK = _CHUNK_PAGES * PAGE_SIZE
_BLOCK_ROWS = 8  # rows of one sequence that go through its pages together, while these are in the cache
_PRODUCTS_PER_OPERATION = 4  # what a vector does while a plain loop does one thing
_BELOW_ANY = np.float32(-1e30)  # a running maximum before the first score; finite, so differences are numbers
_WIDEST = 1 << 62  # a window that sees everything
_NO_SINKS = np.empty(0, dtype=np.float32)


class NumbaAttention:
    """The CPU backend."""

    name = "numba"

    def attend(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, pool: Pages, inputs: ForwardInputs
    ) -> Tensor:
        attended = torch.empty(q.shape, dtype=q.dtype)
        positions = inputs.positions.numpy()
        window = _WIDEST if layer.window is None else layer.window
        launch(
            _attend,
            int(np.minimum(positions + 1, window).sum()) * q.shape[1] * q.shape[2] // _PRODUCTS_PER_OPERATION,
            layer.index,
            as_numpy(q.contiguous()),
            as_numpy(k.contiguous()),
            as_numpy(v.contiguous()),
            as_numpy(pool.k).reshape(-1, q.shape[2], PAGE_SIZE),
            as_numpy(pool.v),
            positions,
            inputs.row_seq.numpy(),
            inputs.page_table.numpy(),
            np.float32(layer.scale * LOG2_E),  # powers of two are cheaper than powers of e
            window,
            _NO_SINKS if layer.sinks is None else layer.sinks.numpy() * np.float32(LOG2_E),
            as_numpy(attended),
        )
        return attended


# From here on, compiled code. q, k, v, pages and out are float32 or bits of bfloat16; all arithmetic is float32.
# A row sees the positions [position + 1 - window, position] that there are. Sinks are [heads], or [0] for none.


@njit(parallel=True)  # no fastmath: that of a parallel kernel holds in what is inlined too, `_has_nan` among it
def _attend(layer, q, k, v, k_pages, v_pages, positions, row_seq, page_table, scale, window, sinks, out):
    num_rows, num_kv_heads, dim = k.shape
    for row in prange(num_rows):
        page_index, slot = positions[row] // PAGE_SIZE, positions[row] % PAGE_SIZE
        for head in range(num_kv_heads):
            page = page_table[row_seq[row], layer, head, page_index]
            for d in range(dim):
                k_pages[page, d, slot] = k[row, head, d]
                v_pages[page, slot, d] = v[row, head, d]

    starts = _block_starts(row_seq)
    num_blocks = len(starts) - 1
    group = q.shape[1] // num_kv_heads
    for task in prange(num_blocks * num_kv_heads):
        block, head = _fold(task // num_kv_heads, num_blocks), task % num_kv_heads
        first, end = starts[block], starts[block + 1]
        pages = page_table[row_seq[first], layer, head]
        heads = slice(head * group, (head + 1) * group)
        block_q, at, block_out = q[first:end, heads], positions[first:end], out[first:end, heads]
        _attend_block(block_q, k_pages, v_pages, pages, at, scale, window, sinks[heads], block_out)
        if end - first > 1 and _has_nan(block_out):  # whose? A weight of 0 makes no 0 of a neighbour's NaN
            for i in range(end - first):
                alone = slice(i, i + 1)
                _attend_block(
                    block_q[alone], k_pages, v_pages, pages, at[alone], scale, window, sinks[heads], block_out[alone]
                )


@njit
def _block_starts(row_seq):
    """First rows of runs of at most _BLOCK_ROWS rows of one sequence; the number of rows as the last entry."""
    starts = np.empty(len(row_seq) + 1, dtype=np.int64)
    count = 0
    for row in range(len(row_seq)):
        if row == 0 or row_seq[row] != row_seq[row - 1] or row - starts[count - 1] == _BLOCK_ROWS:
            starts[count] = row
            count += 1
    starts[count] = len(row_seq)
    return starts[: count + 1]


@njit
def _fold(index, count):
    """0, count-1, 1, count-2, ...: threads take runs of tasks, and the late rows of a prompt cost the most."""
    return index // 2 if index % 2 == 0 else count - 1 - index // 2


@njit
def _has_nan(values):
    """Whether `values` [rows, heads, dim] have one."""
    num_rows, num_heads, dim = values.shape
    for row in range(num_rows):
        for head in range(num_heads):
            for d in range(dim):
                if np.isnan(to_f32(values[row, head, d])):
                    return True
    return False


@njit(fastmath=FUSED)
def _attend_block(q, k_pages, v_pages, pages, positions, scale, window, sinks, out):
    """Consecutive rows of one sequence with the query heads of one kv head: q and out [rows, group, dim].

    Queries go four at a time, the last ones filled up with zeros: whatever a row's neighbours, its own sums
    run through the same code. Tokens that a neighbour sees and a row does not have weight 0 in its sum, which
    leaves it as it is.
    """
    num_rows, group, dim = q.shape
    num_queries = num_rows * group
    padded = (num_queries + 3) // 4 * 4
    queries = np.zeros((padded, dim), dtype=np.float32)
    for i in range(num_queries):
        for d in range(dim):
            queries[i, d] = to_f32(q[i // group, i % group, d]) * scale
    scores = np.zeros((padded, _CHUNK), dtype=np.float32)  # of one chunk; then their exponentials
    peaks = np.full(padded, _BELOW_ANY, dtype=np.float32)
    sums = np.zeros((padded, PAGE_SIZE), dtype=np.float32)  # by place in the page
    totals = np.zeros((padded, dim), dtype=np.float32)
    if len(sinks) > 0:
        for i in range(num_queries):  # a sink is a first score, with nothing to add to the totals
            peaks[i] = sinks[i % group]
            sums[i, 0] = np.float32(1.0)

    start, end = max(positions[0] + 1 - window, 0), positions[-1] + 1  # what any row sees
    for chunk in range(start // _CHUNK * _CHUNK, end, _CHUNK):
        first, length = max(start - chunk, 0), min(end - chunk, _CHUNK)  # in the chunk
        chunk_pages = pages[chunk // PAGE_SIZE : (chunk + length - 1) // PAGE_SIZE + 1]
        for i in range(0, padded, 4):
            _score(queries[i : i + 4], k_pages, chunk_pages, first // PAGE_SIZE, scores[i : i + 4])
        for i in range(num_queries):
            seen_end = positions[i // group] + 1 - chunk
            peaks[i] = _exponentiate(scores[i], seen_end - window, seen_end, peaks[i], sums[i], totals[i])
        for i in range(0, padded, 4):
            _add_values(scores[i : i + 4], first, length, v_pages, chunk_pages, totals[i : i + 4])

    for i in range(num_queries):
        sum = np.float32(0.0)
        for t in range(PAGE_SIZE):
            sum += sums[i, t]
        for d in range(dim):
            out[i // group, i % group, d] = from_f32(totals[i, d] / sum, out[i // group, i % group, d])


@njit
def _score(q, k_pages, pages, first_page, out):
    """q [4, dim] with the keys of up to four pages, from `first_page` on -> out [4, 64]; all of a page, what a row
    does not see too."""
    dim = q.shape[1]
    for i in range(first_page, len(pages)):
        s0, s1, s2, s3 = zeros(), zeros(), zeros(), zeros()
        for d in range(dim):
            keys = load(k_pages, (pages[i] * dim + d) * PAGE_SIZE)
            s0 = add_product(s0, q[0, d], keys)
            s1 = add_product(s1, q[1, d], keys)
            s2 = add_product(s2, q[2, d], keys)
            s3 = add_product(s3, q[3, d], keys)
        store(out, 0 * _CHUNK + i * PAGE_SIZE, s0)
        store(out, 1 * _CHUNK + i * PAGE_SIZE, s1)
        store(out, 2 * _CHUNK + i * PAGE_SIZE, s2)
        store(out, 3 * _CHUNK + i * PAGE_SIZE, s3)


@njit(fastmath=FASTMATH)
def _exponentiate(scores, start, end, old_peak, sums, totals):
    """The scores of [start, end) to 2 ** (score - peak), in place and into `sums`, the others to 0. Returns the new
    running peak; `sums` and `totals` are scaled down to it."""
    _fill_outside(scores, start, end, _BELOW_ANY)
    peak = old_peak
    for t in range(_CHUNK):
        peak = max(peak, scores[t])
    if peak > old_peak:
        fade = exp2(old_peak - peak)
        for t in range(PAGE_SIZE):
            sums[t] *= fade
        for d in range(len(totals)):
            totals[d] *= fade
    for t in range(_CHUNK):
        scores[t] = exp2(scores[t] - peak)
    _fill_outside(scores, start, end, np.float32(0.0))
    for page in range(_CHUNK_PAGES):
        for t in range(PAGE_SIZE):
            sums[t] += scores[page * PAGE_SIZE + t]
    return peak


@njit
def _fill_outside(scores, start, end, value):
    """Two loops that most chunks skip: one with a condition on every score would cost each of them."""
    for t in range(min(start, _CHUNK)):
        scores[t] = value
    for t in range(max(end, 0), _CHUNK):
        scores[t] = value


@njit(fastmath=FUSED)
def _add_values(weights, start, end, v_pages, pages, totals):
    """totals [4, dim] += weights [4, start:end] @ the values of the pages' tokens [start, end), token by token."""
    dim = totals.shape[1]
    vectors = dim // LANES * LANES
    for d in range(0, vectors, LANES):
        t0, t1, t2, t3 = load(totals, d), load(totals, dim + d), load(totals, 2 * dim + d), load(totals, 3 * dim + d)
        for i in range(start // PAGE_SIZE, len(pages)):
            page = i * PAGE_SIZE
            for t in range(max(start, page), min(end, page + PAGE_SIZE)):
                values = load(v_pages, (pages[i] * PAGE_SIZE + t - page) * dim + d)
                t0 = add_product(t0, weights[0, t], values)
                t1 = add_product(t1, weights[1, t], values)
                t2 = add_product(t2, weights[2, t], values)
                t3 = add_product(t3, weights[3, t], values)
        store(totals, d, t0)
        store(totals, dim + d, t1)
        store(totals, 2 * dim + d, t2)
        store(totals, 3 * dim + d, t3)
    for d in range(vectors, dim):
        for t in range(start, end):
            value = to_f32(v_pages[pages[t // PAGE_SIZE], t % PAGE_SIZE, d])
            for i in range(4):
                totals[i, d] += weights[i, t] * value
