"""Experts: whom a router chooses, how much each counts, and that no token feels another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from springtide.engine.layers import ACTIVATIONS
from springtide.engine.linear import Linear
from springtide.engine.models.config import Experts
from springtide.engine.models.experts import MixtureOfExperts, choose

HIDDEN, INNER = 20, 12


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(experts: Experts, dtype: torch.dtype = torch.float32) -> MixtureOfExperts:
    return MixtureOfExperts(
        experts,
        Linear(random(1, experts.count, HIDDEN).to(dtype)),
        [Linear(random(10 + e, 2 * INNER, HIDDEN).to(dtype)) for e in range(experts.count)],
        [Linear(random(50 + e, HIDDEN, INNER).to(dtype)) for e in range(experts.count)],
    )


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    count=st.integers(1, 40),
    share=st.floats(0, 1),
    renormalise=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_best_are_chosen_and_weighed_by_softmax(
    rows: int, count: int, share: float, renormalise: bool, seed: int
) -> None:
    per_token = max(1, round(share * count))
    scores = 5.0 * random(seed, rows, count)
    chosen, weights = choose(scores, Experts(count, per_token, INNER, renormalise))
    best, best_of = scores.softmax(dim=-1).topk(per_token)
    assert torch.equal(chosen, best_of)
    expected = best / best.sum(dim=-1, keepdim=True) if renormalise else best
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_equal_scores_the_lower_number_wins(dtype: torch.dtype) -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    chosen, weights = choose(scores, Experts(4, 2, INNER))
    assert chosen.tolist() == [[1, 2], [0, 1]]
    assert weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_scores_that_are_no_numbers_choose_somebody() -> None:
    """The sampler reports such a row; the rows beside it must not suffer."""
    scores = torch.full((2, 5), torch.nan)
    scores[1] = torch.arange(5.0)
    chosen, weights = choose(scores, Experts(5, 3, INNER))
    assert chosen.tolist() == [[0, 1, 2], [4, 3, 2]]
    assert weights[1].isfinite().all()


def test_a_mixture_is_the_weighted_sum_of_its_experts() -> None:
    experts = Experts(6, 3, INNER)
    x = random(2, 11, HIDDEN)
    scores = x @ random(1, 6, HIDDEN).T
    weights, chosen = scores.topk(3)
    weights = weights.softmax(dim=-1)
    for row, result in enumerate(mixture(experts)(x)):
        expected = torch.zeros(HIDDEN)
        for weight, e in zip(weights[row], chosen[row].tolist(), strict=True):
            hidden = ACTIVATIONS["silu"]((x[row] @ random(10 + e, 2 * INNER, HIDDEN).T)[None])[0]
            expected += weight * (hidden @ random(50 + e, HIDDEN, INNER).T)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_token_feels_another(dtype: torch.dtype) -> None:
    layer = mixture(Experts(7, 3, INNER, renormalise=False), dtype)
    x = random(3, 130, HIDDEN).to(dtype)
    whole = layer(x)
    for count in (1, 2, 3, 5, 8, 17, 64):
        for start in (0, 31, len(x) - count):
            assert torch.equal(layer(x[start : start + count]), whole[start : start + count])


def test_every_token_may_want_the_same_expert() -> None:
    x = random(4, 1, HIDDEN).expand(33, HIDDEN).contiguous()
    outputs = mixture(Experts(5, 1, INNER))(x)
    assert torch.equal(outputs, outputs[:1].expand_as(outputs))
