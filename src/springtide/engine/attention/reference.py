"""Attention as its definition says, one row at a time. Slow; the specification for every other backend."""

from __future__ import annotations

import torch
from torch import Tensor

from springtide.engine.attention.base import PAGE_SIZE, Pages
from springtide.engine.inputs import ForwardInputs


class ReferenceAttention:
    """Plain PyTorch, softmax in float32."""

    name = "reference"

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, pool: Pages, inputs: ForwardInputs, scale: float
    ) -> Tensor:
        tables = inputs.page_table[:, layer].long()  # [seqs, kv_heads, pages]
        positions = inputs.positions.tolist()
        sequences = inputs.row_seq.tolist()
        for row, (position, seq) in enumerate(zip(positions, sequences, strict=True)):
            pages = tables[seq, :, position // PAGE_SIZE]
            pool.k[pages, position % PAGE_SIZE] = k[row]
            pool.v[pages, position % PAGE_SIZE] = v[row]
        attended = torch.empty_like(q)
        for row, (position, seq) in enumerate(zip(positions, sequences, strict=True)):
            attended[row] = _attend_row(q[row], tables[seq], pool, position + 1, scale)
        return attended


def _attend_row(q: Tensor, pages: Tensor, pool: Pages, context: int, scale: float) -> Tensor:
    """`q` [heads, head_dim], `pages` [kv_heads, pages] -> [heads, head_dim]"""
    num_heads, head_dim = q.shape
    num_kv_heads = pages.shape[0]
    used = pages[:, : -(-context // PAGE_SIZE)]
    keys = pool.k[used].view(num_kv_heads, -1, head_dim)[:, :context].float()
    values = pool.v[used].view(num_kv_heads, -1, head_dim)[:, :context].float()
    grouped = q.float().view(num_kv_heads, num_heads // num_kv_heads, head_dim)
    weights = torch.softmax(grouped @ keys.transpose(1, 2) * scale, dim=-1)
    return (weights @ values).view(num_heads, head_dim).to(q.dtype)
