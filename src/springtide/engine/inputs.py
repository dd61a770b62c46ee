"""One step's batch as tensors. Knows nothing of how it was scheduled or where its K/V came from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """What a model reads in one step: ragged rows of any number of sequences, in one flat list.

    A row is one token of one sequence. A sequence may have many rows in a step (a chunk of its prompt) or
    one (its newest token); the rows of one sequence are consecutive and ascend in position. A row first stores
    its own K/V and then attends to positions [0, positions[row]] of its sequence, through the page table.
    """

    token_ids: Tensor  # int64 [rows]
    positions: Tensor  # int64 [rows]: the row's place in its sequence, from 0
    row_seq: Tensor  # int32 [rows]: index into page_table's first axis
    page_table: Tensor  # int32 [seqs, layers, kv_heads, pages], contiguous; see kv.PageTable for what lies past the end
    logit_rows: Tensor  # int64 [logit rows]: the rows whose logits are wanted, ascending
