"""The pieces between products compute what transformers' do, and a row's bits do not depend on the rows beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numba
import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm4 import modeling_glm4
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from springtide.engine.layers import ACTIVATIONS, HeadSplitter, RMSNorm, RotaryEmbedding
from springtide.engine.models.config import Activation, Rope, RopeScaling

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
COUNTS = [*range(1, 34), 63, 64, 65, 100, 127, 128, 200, 255, 256, 257, 300, 511, 512, 599, 600]
HEADS, KV_HEADS = 4, 2
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Within a rounding or two of the dtype."""
    step = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=4 * step, atol=4 * step)


def assert_rows_alone(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """`function` of some rows of x is the same rows of `function` of all of x."""
    whole = function(x)
    for count in COUNTS:
        for start in {0, (len(x) - count) // 2, len(x) - count}:
            part = function(x[start : start + count])
            assert torch.equal(part, whole[start : start + count]), f"rows {start} to {start + count}"


# ---- normalisation


@DTYPES
@pytest.mark.parametrize("width", [60, 576])
def test_norm_rounds_before_the_product_as_llama_does(dtype: torch.dtype, width: int) -> None:
    x, weight = random(50, width, dtype=dtype), random(width, dtype=dtype)
    theirs = LlamaRMSNorm(width, eps=EPS).to(dtype)
    theirs.weight.data.copy_(weight)
    ours = RMSNorm(weight, EPS)(x)
    assert_near(ours, theirs(x))
    assert _share_of_equal_bits(ours, theirs(x)) > 0.99 or dtype == torch.float32


@DTYPES
@pytest.mark.parametrize("width", [60, 576])
def test_norm_with_a_float32_weight_rounds_once_as_gemma_does(dtype: torch.dtype, width: int) -> None:
    x, weight = random(50, width, dtype=dtype), random(width)
    theirs = Gemma3RMSNorm(width, eps=EPS)
    theirs.weight.data.copy_(weight)
    ours = RMSNorm(1.0 + weight, EPS)(x)
    assert ours.dtype == dtype
    assert_near(ours, theirs(x))
    assert _share_of_equal_bits(ours, theirs(x)) > 0.99 or dtype == torch.float32


# ---- activations


def _gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    limits = SimpleNamespace(alpha=1.702, limit=7.0)
    return GptOssExperts._apply_gate(limits, torch.stack([gate, up], dim=-1).flatten(-2))  # type: ignore[arg-type]


THEIR_ACTIVATIONS: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: torch.nn.functional.silu(gate) * up,
    "gelu_tanh": lambda gate, up: torch.nn.functional.gelu(gate, approximate="tanh") * up,
    "clamped_swiglu": _gpt_oss,
}


@DTYPES
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_activations_equal_theirs(dtype: torch.dtype, name: Activation, scale: float) -> None:
    gate_up = scale * random(50, 2 * 60, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    ours, theirs = ACTIVATIONS[name](gate_up), THEIR_ACTIVATIONS[name](gate, up)
    # The last bit of theirs is one of gate * up: 1 + tanh, and up + 1, may all but vanish.
    step = torch.finfo(dtype).eps * gate.abs() * (up.abs() + 1.0)
    assert ((ours - theirs).abs() <= 4 * step).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_number_too_large_or_broken_stays_what_it_is(name: Activation) -> None:
    activate = ACTIVATIONS[name]
    assert activate(torch.tensor([[1e20, -1e20, 1.0, 1.0]])).isfinite().all()
    assert activate(torch.tensor([[math.nan, 1.0, 1.0, math.nan]])).isnan().all()


# ---- rotary positions


def _yarn(**changes: Any) -> RopeScaling:
    return RopeScaling(**{"kind": "yarn", "factor": 32.0, "original_context_length": 4096, **changes})


YARN = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
}
YARN_FACTOR = 0.1 * math.log(32.0) + 1.0
SCALINGS: list[Any] = [
    pytest.param(None, {"rope_type": "default"}, id="none"),
    pytest.param(RopeScaling("linear", 4.0), {"rope_type": "linear", "factor": 4.0}, id="linear"),
    pytest.param(
        RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        id="llama3",
    ),
    pytest.param(_yarn(attention_factor=YARN_FACTOR), YARN, id="yarn"),
    pytest.param(
        _yarn(attention_factor=YARN_FACTOR, truncate=False),
        YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
        id="yarn as in gpt-oss",
    ),
    pytest.param(
        _yarn(beta_fast=16.0, beta_slow=2.0, attention_factor=0.7),
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.7},
        id="yarn with all its numbers",
    ),
    pytest.param(
        _yarn(beta_fast=1e6, beta_slow=1e5, truncate=False),
        YARN | {"beta_fast": 1e6, "beta_slow": 1e5, "truncate": False, "attention_factor": 1.0},
        id="yarn that keeps no wave",
    ),
    pytest.param(
        _yarn(beta_fast=0.001, beta_slow=0.001, original_context_length=16),
        YARN
        | {
            "beta_fast": 0.001,
            "beta_slow": 0.001,
            "original_max_position_embeddings": 16,
            "attention_factor": 1.0,
        },
        id="yarn that blends within one step",
    ),
]


@pytest.mark.parametrize(("scaling", "parameters"), SCALINGS)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_tables_equal_theirs(scaling: RopeScaling | None, parameters: dict[str, Any], head_dim: int) -> None:
    parameters = {"rope_theta": 150_000.0} | parameters
    config = LlamaConfig(
        hidden_size=HEADS * head_dim,
        num_attention_heads=HEADS,
        max_position_embeddings=131_072,
        rope_parameters=parameters,
    )
    positions = torch.arange(0, 4096, 13)
    cos, sin = LlamaRotaryEmbedding(config)(random(1), positions[None])
    ours = RotaryEmbedding(Rope(150_000.0, head_dim, scaling))
    # Late positions multiply the last bit of a frequency.
    for table, theirs in ((ours.cos, cos), (ours.sin, sin)):
        found = torch.from_numpy(table)[positions]
        torch.testing.assert_close(found, theirs[0, :, : head_dim // 2], rtol=1e-5, atol=4096 * 2.0**-23)
        torch.testing.assert_close(found[:5], theirs[0, :5, : head_dim // 2], rtol=1e-6, atol=1e-5)


def test_gpt_oss_turns_as_in_its_own_code() -> None:
    config = GptOssConfig(hidden_size=4 * 64, num_attention_heads=4, head_dim=64)
    given = config.rope_parameters
    scaling = _yarn(
        factor=given["factor"],
        original_context_length=given["original_max_position_embeddings"],
        attention_factor=0.1 * math.log(given["factor"]) + 1.0,
        truncate=given["truncate"],
    )
    cos, sin = GptOssRotaryEmbedding(config)(random(1), torch.arange(50)[None])
    ours = RotaryEmbedding(Rope(given["rope_theta"], 64, scaling))
    torch.testing.assert_close(torch.from_numpy(ours.cos[:50]), cos[0], rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(torch.from_numpy(ours.sin[:50]), sin[0], rtol=1e-6, atol=4e-6)


def test_factors_of_a_file_divide_the_frequencies_in_place_of_the_scaling() -> None:
    scaled = RotaryEmbedding(Rope(1e4, 16, RopeScaling("linear", 4.0)))
    given = RotaryEmbedding(Rope(1e4, 16, RopeScaling("linear", 9.0)), torch.full((8,), 4.0))
    assert (given.cos == scaled.cos).all()
    assert (given.sin == scaled.sin).all()


def test_tables_grow_and_keep_what_they_had() -> None:
    rotary = RotaryEmbedding(Rope(1e4, 16))
    before = rotary.cos
    rotary.reach(len(before) - 1)
    assert rotary.cos is before
    rotary.reach(20_000)
    assert len(rotary.cos) == len(rotary.sin) == 32_768
    assert (rotary.cos[: len(before)] == before).all()


# ---- heads


def splitter(head_dim: int, rotated: int, norm: Tensor | None = None) -> HeadSplitter:
    rotary = RotaryEmbedding(Rope(1e4, rotated)) if rotated else None
    return HeadSplitter(HEADS, KV_HEADS, head_dim, rotary, q_norm=norm, k_norm=norm, eps=EPS)


def in_heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of [rows, ...]: q, k, v, each [rows, heads, head_dim]."""
    heads = qkv.view(len(qkv), HEADS + 2 * KV_HEADS, -1)
    return heads[:, :HEADS], heads[:, HEADS:-KV_HEADS], heads[:, -KV_HEADS:]


def _their_tables(head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    config = LlamaConfig(
        hidden_size=HEADS * head_dim,
        num_attention_heads=HEADS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    cos, sin = LlamaRotaryEmbedding(config)(random(1), positions[None])
    return cos, sin


@DTYPES
@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_heads_turn_as_in_llama(dtype: torch.dtype, head_dim: int) -> None:
    qkv, positions = random(50, 8 * head_dim, dtype=dtype), torch.arange(100, 150)
    q, k, v = splitter(head_dim, head_dim)(qkv, positions)

    their_q, their_k, their_v = in_heads(qkv)
    cos, sin = _their_tables(head_dim, positions)
    their_q, their_k = apply_rotary_pos_emb(their_q.float()[None], their_k.float()[None], cos, sin, unsqueeze_dim=2)
    atol = 4 * torch.finfo(dtype).eps + 100 * 2.0**-23  # as in the tables
    torch.testing.assert_close(q, their_q[0].to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=atol)
    torch.testing.assert_close(k, their_k[0].to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=atol)
    assert torch.equal(v, their_v)


@DTYPES
def test_the_products_of_a_turn_are_rounded_each_by_itself(dtype: torch.dtype) -> None:
    """A compiler that may fuse one of two with their sum chooses either, and not always the same one."""
    qkv, positions = random(50, 8 * 64, dtype=dtype), torch.arange(100, 150)
    q, k, _ = splitter(64, 64)(qkv, positions)
    rotary = RotaryEmbedding(Rope(1e4, 64))
    cos, sin = (torch.from_numpy(table)[positions, None] for table in (rotary.cos, rotary.sin))
    for ours, given in ((q, in_heads(qkv)[0]), (k, in_heads(qkv)[1])):
        first, second = given.float().chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        assert torch.equal(ours, turned.to(dtype))


@DTYPES
@pytest.mark.parametrize("family", ["Llama", "Gemma"])
def test_heads_are_normed_before_they_turn(dtype: torch.dtype, family: str) -> None:
    """As in Qwen3, whose norm is Llama's, and in Gemma 3."""
    head_dim = 64
    qkv, positions = random(50, 8 * head_dim, dtype=dtype), torch.arange(50)
    weight = random(head_dim, dtype=dtype if family == "Llama" else torch.float32)
    q, k, v = splitter(head_dim, head_dim, weight)(qkv, positions)

    their_q, their_k, their_v = in_heads(qkv)
    norm = RMSNorm(weight, EPS)  # equal to theirs: see above
    normed_q = norm(their_q.reshape(-1, head_dim)).view(their_q.shape)
    normed_k = norm(their_k.reshape(-1, head_dim)).view(their_k.shape)
    turn = splitter(head_dim, head_dim)
    expected = turn(torch.cat([normed_q, normed_k, their_v], dim=1).flatten(1), positions)
    for ours, theirs in zip((q, k, v), expected, strict=True):
        assert torch.equal(ours, theirs)


@DTYPES
def test_queries_may_be_normed_without_the_keys(dtype: torch.dtype) -> None:
    qkv, positions = random(20, 8 * 16, dtype=dtype), torch.arange(20)
    norm = random(16, dtype=dtype)
    both, neither = splitter(16, 16, norm)(qkv, positions), splitter(16, 16)(qkv, positions)
    q, k, _ = HeadSplitter(HEADS, KV_HEADS, 16, RotaryEmbedding(Rope(1e4, 16)), q_norm=norm, eps=EPS)(qkv, positions)
    assert torch.equal(q, both[0])
    assert torch.equal(k, neither[1])


@DTYPES
@pytest.mark.parametrize("rotated", [0, 8, 32])
def test_only_the_first_part_of_a_head_turns(dtype: torch.dtype, rotated: int) -> None:
    qkv, positions = random(50, 8 * 64, dtype=dtype), torch.arange(50)
    q, k, v = splitter(64, rotated)(qkv, positions)
    their_q, their_k, their_v = in_heads(qkv)
    for ours, given in ((q, their_q), (k, their_k)):
        assert torch.equal(ours[..., rotated:], given[..., rotated:])
        assert not rotated or not torch.equal(ours[1:, :, :rotated], given[1:, :, :rotated])
    assert torch.equal(v, their_v)


def test_half_of_a_head_turns_as_in_glm4_once_its_rows_are_permuted() -> None:
    """GLM-4 pairs neighbours; with the even rows before the odd ones, our pairs are its pairs."""
    rotated, head_dim, positions = 32, 64, torch.arange(50)
    given_q, given_k, given_v = in_heads(random(50, 8 * head_dim))
    cos, sin = _their_tables(rotated, positions)
    their_q, their_k = modeling_glm4.apply_rotary_pos_emb(given_q[None], given_k[None], cos, sin, unsqueeze_dim=2)
    order = torch.cat([torch.arange(0, rotated, 2), torch.arange(1, rotated, 2), torch.arange(rotated, head_dim)])
    permuted = torch.cat([given_q[..., order], given_k[..., order], given_v], dim=1)
    q, k, _ = splitter(head_dim, rotated)(permuted.flatten(1), positions)
    torch.testing.assert_close(q, their_q[0][..., order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(k, their_k[0][..., order], rtol=1e-5, atol=1e-5)


# ---- a row's bits depend on that row alone


@pytest.fixture(params=[1, None], ids=["one thread", "all threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = numba.get_num_threads()
    numba.set_num_threads(request.param or before)
    yield
    numba.set_num_threads(before)


@DTYPES
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("width", [60, 93, 576])
def test_rows_are_alone_in_norms_and_activations(dtype: torch.dtype, width: int) -> None:
    x, gate_up = 3 * random(700, width, dtype=dtype), 3 * random(700, 2 * width, dtype=dtype)
    assert_rows_alone(RMSNorm(random(width, dtype=dtype), EPS), x)
    assert_rows_alone(RMSNorm(random(width), EPS), x)
    for activate in ACTIVATIONS.values():
        assert_rows_alone(activate, gate_up)


@DTYPES
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("head_dim", "rotated"), [(8, 8), (24, 12), (64, 64), (80, 40), (64, 0)])
@pytest.mark.parametrize("normed", [False, True], ids=["as they are", "normed"])
def test_rows_are_alone_when_heads_are_split(dtype: torch.dtype, head_dim: int, rotated: int, normed: bool) -> None:
    split = splitter(head_dim, rotated, random(head_dim, dtype=dtype) if normed else None)
    qkv, positions = random(700, 8 * head_dim, dtype=dtype), torch.arange(700)
    whole = split(qkv, positions)
    for count in (1, 2, 5, 64):
        some = slice(300, 300 + count)
        for part, all_rows in zip(split(qkv[some], positions[some]), whole, strict=True):
            assert torch.equal(part, all_rows[some])


def _share_of_equal_bits(ours: Tensor, theirs: Tensor) -> float:
    return (ours == theirs).float().mean().item()
