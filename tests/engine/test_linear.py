"""A row's bits do not depend on the rows beside it: products and the pieces between them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from springtide.engine.layers import RMSNorm, RotaryEmbedding, silu_and_mul
from springtide.engine.linear import Linear, row_invariant, varying_products
from springtide.engine.models.config import ModelConfig

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


@pytest.mark.parametrize("width", [60, 93, 576, 2048])
def test_the_pieces_between(dtype: torch.dtype, width: int) -> None:
    norm = RMSNorm(random(width, dtype=dtype), 1e-5)
    assert_rows_alone(norm, 3 * random(700, width, dtype=dtype), COUNTS)
    assert_rows_alone(silu_and_mul, 3 * random(700, 2 * width, dtype=dtype), COUNTS)


@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_rotation(dtype: torch.dtype, head_dim: int) -> None:
    rotary = RotaryEmbedding(_config(head_dim))
    qkv, positions = random(700, 8 * head_dim, dtype=dtype), torch.arange(700)
    whole = rotary.split(qkv, positions)
    for count in (1, 2, 5, 64):
        some = slice(300, 300 + count)
        for part, all_rows in zip(rotary.split(qkv[some], positions[some]), whole, strict=True):
            assert torch.equal(part, all_rows[some])


@pytest.mark.parametrize("width", [60, 576])
def test_norm_and_activation_equal_transformers(dtype: torch.dtype, width: int) -> None:
    x, weight = random(50, width, dtype=dtype), random(width, dtype=dtype)
    theirs = LlamaRMSNorm(width, eps=1e-5).to(dtype)
    theirs.weight.data.copy_(weight)
    assert_near(RMSNorm(weight, 1e-5)(x), theirs(x))

    gate_up = 3 * random(50, 2 * width, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    assert_near(silu_and_mul(gate_up), torch.nn.functional.silu(gate) * up)


def test_rotation_equals_transformers(dtype: torch.dtype) -> None:
    head_dim = 64
    qkv, positions = random(50, 8 * head_dim, dtype=dtype), torch.arange(100, 150)
    q, k, v = RotaryEmbedding(_config(head_dim)).split(qkv, positions)

    heads = qkv.float().view(1, 50, 8, head_dim).transpose(1, 2)
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=1024)
    cos, sin = LlamaRotaryEmbedding(config)(heads, positions[None])
    their_q, their_k = apply_rotary_pos_emb(heads[:, :4], heads[:, 4:6], cos, sin)
    assert_near(q, their_q[0].transpose(0, 1).to(dtype))
    assert_near(k, their_k[0].transpose(0, 1).to(dtype))
    assert torch.equal(v, qkv.view(50, 8, head_dim)[:, 6:])


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Within a rounding or two of the dtype."""
    step = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=4 * step, atol=4 * step)


def _config(head_dim: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=1,
        hidden_size=4 * head_dim,
        intermediate_size=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        vocab_size=8,
        context_length=1024,
    )
