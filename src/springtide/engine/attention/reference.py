"""Attention as its definition says, one row at a time. Slow; the specification for every other backend."""

from __future__ import annotations

import torch
from torch import Tensor

from springtide.engine.attention.base import PAGE_SIZE, AttentionLayer, Pages
from springtide.engine.inputs import ForwardInputs


class ReferenceAttention:
    """Plain PyTorch, softmax in float32."""

    name = "reference"

    def attend(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, pool: Pages, inputs: ForwardInputs
    ) -> Tensor:
        tables = inputs.page_table[:, layer.index].long()  # [seqs, kv_heads, pages]
        positions = inputs.positions.tolist()
        sequences = inputs.row_seq.tolist()
        for row, (position, seq) in enumerate(zip(positions, sequences, strict=True)):
            pages = tables[seq, :, position // PAGE_SIZE]
            pool.k[pages, position % PAGE_SIZE] = k[row]
            pool.v[pages, position % PAGE_SIZE] = v[row]
        attended = torch.empty_like(q)
        for row, (position, seq) in enumerate(zip(positions, sequences, strict=True)):
            attended[row] = _attend_row(layer, q[row], tables[seq], pool, position)
        return attended


def _attend_row(layer: AttentionLayer, q: Tensor, pages: Tensor, pool: Pages, position: int) -> Tensor:
    """`q` [heads, head_dim], `pages` [kv_heads, pages] -> [heads, head_dim]"""
    num_heads, head_dim = q.shape
    num_kv_heads = pages.shape[0]
    first = 0 if layer.window is None else max(position + 1 - layer.window, 0)
    keys = _read(pool.k, pages, first, position + 1)
    values = _read(pool.v, pages, first, position + 1)
    grouped = q.float().view(num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = (grouped @ keys.transpose(1, 2) * layer.scale).view(num_heads, -1)
    weights = _softmax(scores, layer.sinks).view(num_kv_heads, -1, scores.shape[1])
    return (weights @ values).view(num_heads, head_dim).to(q.dtype)


def _read(stored: Tensor, pages: Tensor, start: int, end: int) -> Tensor:
    """The keys or values of positions [start, end): float32 [kv_heads, end - start, head_dim]. Reads no page that
    has none of them."""
    first_page = start // PAGE_SIZE
    read = stored[pages[:, first_page : -(-end // PAGE_SIZE)]].flatten(1, 2)
    return read[:, start - first_page * PAGE_SIZE : end - first_page * PAGE_SIZE].float()


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """[heads, tokens] -> [heads, tokens]. With sinks [heads], each head has one score more, and its weight is
    dropped."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    return torch.softmax(torch.cat([scores, sinks[:, None]], dim=-1), dim=-1)[:, :-1]
