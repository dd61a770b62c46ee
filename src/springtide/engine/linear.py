"""Matrix products whose rows do not feel each other.

A row of `linear(x, w)` is the same bits whatever other rows share the call; on this, one seed giving one text
(alone, batched, chunked or resumed) rests. torch's products do not promise it: they choose a kernel by the
number of rows, and kernels differ in the order of their sums.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

# Measured over shapes from 24 to 49152 and 1 to 600 rows (torch 2.13 on x86): float32 takes another kernel for
# what is left of a row count after multiples of four, bfloat16 for a single row. Every multiple of four agrees.
ROW_QUANTUM = 4

_TRIED_ROWS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 32, 64)
_TRIED_WEIGHTS = 1 << 20


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


def varying_products(products: Mapping[str, Linear]) -> list[str]:
    """Those of a model's products that do not keep the promise on this machine, by name. Takes some milliseconds
    each: see `row_invariant`."""
    return [
        name
        for name, linear in products.items()
        if not row_invariant(linear.weight.dtype, linear.weight.shape[1], linear.weight.shape[0])
    ]


def row_invariant(dtype: torch.dtype, in_features: int, out_features: int) -> bool:
    """Whether `Linear` keeps its promise on this machine for one shape: some row counts are tried against one
    product of many rows, at two places. Of a large weight only as many outputs as are computed in a moment: it is
    the rows and the length of the sums that choose a kernel."""
    out_features = min(out_features, max(64, _TRIED_WEIGHTS // in_features))
    generator = torch.Generator().manual_seed(0)
    linear = Linear(torch.randn(out_features, in_features, generator=generator).to(dtype))
    x = torch.randn(2 * max(_TRIED_ROWS), in_features, generator=generator).to(dtype)
    whole = linear(x)
    return all(
        torch.equal(linear(x[start : start + rows]), whole[start : start + rows])
        for rows in _TRIED_ROWS
        for start in (0, len(x) - rows)
    )
