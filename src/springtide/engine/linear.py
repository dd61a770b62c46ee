"""Matrix products whose rows do not feel each other.

A row of `linear(x, w)` is the same bits whatever other rows share the call; on this, one seed giving one text
(alone, batched, chunked or resumed) rests. torch's products do not promise it: they choose a kernel by the
number of rows, and kernels differ in the order of their sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Measured over shapes from 24 to 49152 and 1 to 600 rows (torch 2.13 on x86): float32 takes another kernel for
# what is left of a row count after multiples of four, bfloat16 for a single row. Every multiple of four agrees.
ROW_QUANTUM = 4


class Linear:
    """`x @ weight.T + bias`. `weight` is [out, in], `bias` [out] or None, both of one dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self._transposed = weight.t()

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]; each row's result depends on that row alone."""
        rows = x.shape[0]
        missing = -rows % ROW_QUANTUM
        product = torch.mm(F.pad(x, (0, 0, 0, missing)) if missing else x, self._transposed)
        if self.bias is not None:
            product += self.bias
        return product[:rows] if missing else product


def row_invariant(dtype: torch.dtype, in_features: int = 1536, out_features: int = 192, most_rows: int = 80) -> bool:
    """Whether `Linear` keeps its promise on this machine for one shape: tried for every row count up to
    `most_rows` against one product of all rows, at two places. Takes some milliseconds."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    x = torch.randn(2 * most_rows, in_features, generator=generator).to(dtype)
    linear = Linear(weight)
    whole = linear(x)
    return all(
        torch.equal(linear(x[start : start + rows]), whole[start : start + rows])
        for rows in range(1, most_rows + 1)
        for start in (0, 2 * most_rows - rows)
    )
