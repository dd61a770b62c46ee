"""A row's bits do not depend on the rows beside it: products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from springtide.engine.linear import Linear, row_invariant, varying_products

DTYPES = [torch.float32, torch.bfloat16]
COUNTS = [*range(1, 34), 63, 64, 65, 100, 127, 128, 200, 255, 256, 257, 300, 511, 512, 599, 600]
FEW_COUNTS = [1, 2, 3, 4, 5, 7, 8, 12, 13, 16, 17, 31, 64, 65]

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def assert_rows_alone(function: Callable[[Tensor], Tensor], x: Tensor, counts: list[int]) -> None:
    """`function` of some rows of x is the same rows of `function` of all of x."""
    whole = function(x)
    for count in counts:
        for start in {0, (len(x) - count) // 2, len(x) - count}:
            part = function(x[start : start + count])
            assert torch.equal(part, whole[start : start + count]), f"rows {start} to {start + count}"


@pytest.mark.parametrize(
    ("out_features", "in_features", "counts"),
    [
        pytest.param(960, 576, COUNTS, id="qkv"),
        pytest.param(576, 576, COUNTS, id="output"),
        pytest.param(3072, 576, COUNTS, id="gate and up"),
        pytest.param(576, 1536, COUNTS, id="down"),
        pytest.param(49152, 576, FEW_COUNTS, id="lm_head"),
        pytest.param(80, 60, COUNTS, id="narrow"),
        pytest.param(60, 93, COUNTS, id="odd"),
        pytest.param(1000, 4096, FEW_COUNTS, id="deep"),
    ],
)
def test_products(dtype: torch.dtype, out_features: int, in_features: int, counts: list[int]) -> None:
    linear = Linear(random(out_features, in_features, dtype=dtype), random(out_features, dtype=dtype))
    assert_rows_alone(linear, random(700 if counts is COUNTS else 80, in_features, dtype=dtype), counts)


def test_the_self_check_agrees(dtype: torch.dtype) -> None:
    assert row_invariant(dtype, 1536, 192)
    assert row_invariant(dtype, 576, 49152)


def test_the_self_check_finds_products_that_vary(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    products = {"a": Linear(random(60, 93, dtype=dtype)), "b": Linear(random(80, 576, dtype=dtype))}
    assert varying_products(products) == []
    alone = Linear.__call__

    def other_for_one_row(self: Linear, x: Tensor) -> Tensor:
        product = alone(self, x)
        return product * 1.5 if len(x) == 1 and x.shape[1] == 93 else product

    monkeypatch.setattr(Linear, "__call__", other_for_one_row)
    assert varying_products(products) == ["a"]
