"""The seam between a model and whatever computes its attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from springtide.engine.inputs import ForwardInputs

PAGE_SIZE = 16


class Pages(Protocol):
    """Where keys and values lie: one page is 16 tokens of one (layer, kv head).

    Both tensors are [pages, 16, head_dim], contiguous, in the model's dtype. Pages are copied and freed whole by
    others, but what stands where inside a page is the backend's business: a pool is used with one backend.
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """How one layer attends.

    index: the layer's place in the page table. scale: what products of query and key are multiplied by. window:
    a row sees only that many of the newest positions, its own included; None: all. sinks: float32 [heads], a
    score for each query head that takes its share of the softmax and brings no value.
    """

    index: int
    scale: float
    window: int | None = None
    sinks: Tensor | None = None


class AttentionBackend(Protocol):
    """Stores the keys and values of a step, then attends with ragged rows: prefill chunks and single decode rows
    of many sequences in one call. A row's result never depends on the other rows of the call."""

    name: str

    def attend(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, pool: Pages, inputs: ForwardInputs
    ) -> Tensor:
        """`q` [rows, heads, head_dim], `k` and `v` [rows, kv_heads, head_dim] -> [rows, heads, head_dim].

        Row r writes its k and v to its position's slot, and attends to the positions up to positions[r] of its
        sequence, its own included, as far back as the layer's window. Query head h reads kv head
        h // (heads / kv_heads).
        """
