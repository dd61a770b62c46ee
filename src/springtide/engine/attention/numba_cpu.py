"""Paged attention on CPU, compiled by Numba: ragged rows, grouped heads, float32 or bfloat16 pages.

A row's arithmetic is fixed by its own position: a score is summed along the head in order, the softmax goes
over chunks of four pages counted from position 0, values are added token by token. Which rows share the call,
how a prompt was chunked, and how many threads run do not enter into it.

Inside a page, keys are stored transposed, [head_dim, 16]: sixteen scores then are one vector, and no sum runs
across its lanes.
"""
# Numba infers the types of kernels:
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from springtide.engine.attention.base import PAGE_SIZE, Pages
from springtide.engine.inputs import ForwardInputs
from springtide.engine.jit import FASTMATH, LOG2_E, as_numpy, exp2, from_f32, launch, njit, prange, to_f32

HEAD_DIM_MULTIPLE = 8  # the unrolled loops below take whole eights of a head

_CHUNK_PAGES = 4  # pages between two rescalings of the running softmax
_CHUNK = _CHUNK_PAGES * PAGE_SIZE
_BLOCK_ROWS = 8  # rows of one sequence that share the widening of a page to float32
_PRODUCTS_PER_OPERATION = 4  # what a vector does while a plain loop does one thing
_BELOW_ANY = np.float32(-1e30)  # a running maximum before the first score; finite, so differences are numbers


class NumbaAttention:
    """The CPU backend: head sizes that are multiples of eight."""

    name = "numba"

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, pool: Pages, inputs: ForwardInputs, scale: float
    ) -> Tensor:
        attended = torch.empty(q.shape, dtype=q.dtype)
        positions = inputs.positions.numpy()
        launch(
            _attend,
            (int(positions.sum()) + len(positions)) * q.shape[1] * q.shape[2] // _PRODUCTS_PER_OPERATION,
            layer,
            as_numpy(q.contiguous()),
            as_numpy(k.contiguous()),
            as_numpy(v.contiguous()),
            as_numpy(pool.k).reshape(-1, q.shape[2], PAGE_SIZE),
            as_numpy(pool.v),
            positions,
            inputs.row_seq.numpy(),
            inputs.page_table.numpy(),
            np.float32(scale * LOG2_E),  # powers of two are cheaper than powers of e
            as_numpy(attended),
        )
        return attended


# From here on, compiled code. q, k, v, pages and out are float32 or bits of bfloat16; all arithmetic is float32.


@njit(parallel=True, fastmath=FASTMATH)
def _attend(layer, q, k, v, k_pages, v_pages, positions, row_seq, page_table, scale, out):
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
        _attend_block(q[first:end, heads], k_pages, v_pages, pages, positions[first:end], scale, out[first:end, heads])


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


@njit(fastmath=FASTMATH)
def _attend_block(q, k_pages, v_pages, pages, positions, scale, out):
    """Consecutive rows of one sequence with the query heads of one kv head: q and out [rows, group, dim]."""
    num_rows, group, dim = q.shape
    queries = np.empty((num_rows, group, dim), dtype=np.float32)
    for row in range(num_rows):
        for g in range(group):
            for d in range(dim):
                queries[row, g, d] = to_f32(q[row, g, d]) * scale
    scores = np.empty((num_rows, group, _CHUNK), dtype=np.float32)  # of one chunk; then their exponentials
    peaks = np.full((num_rows, group), _BELOW_ANY, dtype=np.float32)
    sums = np.zeros((num_rows, group, PAGE_SIZE), dtype=np.float32)  # by place in the page
    totals = np.zeros((num_rows, group, dim), dtype=np.float32)
    tile = np.empty((_CHUNK_PAGES, PAGE_SIZE * dim), dtype=np.float32)

    for chunk in range(0, positions[-1] + 1, _CHUNK):
        num_pages = min(_CHUNK_PAGES, (positions[-1] - chunk) // PAGE_SIZE + 1)
        for page in range(num_pages):
            _widen(k_pages[pages[chunk // PAGE_SIZE + page]], tile[page])
        for row in range(num_rows):
            length = min(_CHUNK, positions[row] + 1 - chunk)  # tokens of this chunk that the row sees
            if length > 0:
                for g in range(group):
                    _score(queries[row, g], tile, length, scores[row, g])
                    peaks[row, g] = _exponentiate(scores[row, g], length, peaks[row, g], sums[row, g], totals[row, g])
        for page in range(num_pages):
            _widen(v_pages[pages[chunk // PAGE_SIZE + page]], tile[page])
        for row in range(num_rows):
            length = min(_CHUNK, positions[row] + 1 - chunk)
            if length > 0:
                for g in range(group):
                    _add_values(scores[row, g], tile, length, totals[row, g])

    for row in range(num_rows):
        for g in range(group):
            sum = np.float32(0.0)
            for t in range(PAGE_SIZE):
                sum += sums[row, g, t]
            for d in range(dim):
                out[row, g, d] = from_f32(totals[row, g, d] / sum, out[row, g, d])


@njit(fastmath=FASTMATH)
def _widen(page, tile):
    """A page as float32, flat."""
    values = page.reshape(-1)
    for i in range(len(tile)):
        tile[i] = to_f32(values[i])


@njit(fastmath=FASTMATH)
def _score(query, tile, length, scores):
    """Products of a query with the keys of a chunk; tile [pages, dim * 16]. Whole pages: what lies past
    `length` is scored too, and ignored later."""
    for i in range(_CHUNK):
        scores[i] = 0.0
    num_pages = (length + PAGE_SIZE - 1) // PAGE_SIZE
    for d in range(0, len(query), 8):
        q0, q1, q2, q3 = query[d], query[d + 1], query[d + 2], query[d + 3]
        q4, q5, q6, q7 = query[d + 4], query[d + 5], query[d + 6], query[d + 7]
        for page in range(num_pages):
            keys = tile[page, d * PAGE_SIZE : (d + 8) * PAGE_SIZE]
            out = scores[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            for t in range(PAGE_SIZE):
                score = out[t] + q0 * keys[t] + q1 * keys[t + 16] + q2 * keys[t + 32] + q3 * keys[t + 48]
                out[t] = score + q4 * keys[t + 64] + q5 * keys[t + 80] + q6 * keys[t + 96] + q7 * keys[t + 112]


@njit(fastmath=FASTMATH)
def _exponentiate(scores, length, old_peak, sums, totals):
    """Scores to 2 ** (score - peak), in place and into `sums`; returns the new running peak, and scales `sums`
    and `totals` down to it."""
    for t in range(length, _CHUNK):
        scores[t] = _BELOW_ANY
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
    for page in range(_CHUNK_PAGES):
        for t in range(PAGE_SIZE):
            sums[t] += scores[page * PAGE_SIZE + t]
    return peak


@njit(fastmath=FASTMATH)
def _add_values(weights, tile, length, totals):
    """totals += weights @ values, token by token; tile [pages, 16 * dim]."""
    dim = len(totals)
    values = tile.reshape(-1)
    t = 0
    while t + 8 <= length:
        w0, w1, w2, w3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        w4, w5, w6, w7 = weights[t + 4], weights[t + 5], weights[t + 6], weights[t + 7]
        v = values[t * dim : (t + 8) * dim]
        for d in range(dim):
            total = totals[d] + w0 * v[d] + w1 * v[dim + d] + w2 * v[2 * dim + d] + w3 * v[3 * dim + d]
            total = total + w4 * v[4 * dim + d] + w5 * v[5 * dim + d] + w6 * v[6 * dim + d] + w7 * v[7 * dim + d]
            totals[d] = total
        t += 8
    while t < length:
        for d in range(dim):
            totals[d] += weights[t] * values[t * dim + d]
        t += 1
