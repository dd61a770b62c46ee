"""The pieces between the products: normalisation, rotary positions, gated activations.

All of them work row by row, so no row feels another (`layer_kernels.py`). Knows nothing of layers or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from springtide.engine import layer_kernels
from springtide.engine.jit import as_numpy, launch
from springtide.engine.models.config import Activation, Rope, RopeScaling

_FIRST_POSITIONS = 4096


class RMSNorm:
    """Root-mean-square normalisation (Zhang and Sennrich 2019), computed in float32.

    A `weight` [n] in the model's dtype: what is normed is rounded to it before the product, as Llama does. One in
    float32 beside a bfloat16 model: only the product is rounded, as Gemma does.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = as_numpy(weight)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, n] -> [rows, n]"""
        normed = torch.empty_like(x)
        launch(layer_kernels.rms_norm, x.numel(), as_numpy(x), self._weight, self._eps, as_numpy(normed))
        return normed


class RotaryEmbedding:
    """Cosines and sines of the angles that pairs of dimensions turn by, growing with the position.

    They are float32 tables [positions, rope.dim / 2], looked up by position, never recomputed: a position's are
    the same in every batch. `freq_factors` [rope.dim / 2], if a file brings them, divide the frequencies in place
    of what `rope.scaling` would do to them.
    """

    def __init__(self, rope: Rope, freq_factors: Tensor | None = None) -> None:
        self._frequencies = _frequencies(rope, freq_factors).numpy()
        self._factor = rope.scaling.attention_factor if rope.scaling else 1.0
        self.cos, self.sin = self._tables(_FIRST_POSITIONS)

    def reach(self, position: int) -> None:
        """Make the tables long enough for `position`: few sequences come near a context of millions."""
        if position >= len(self.cos):
            self.cos, self.sin = self._tables(1 << position.bit_length())

    def _tables(self, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
        """From float64, whose last bit, that of the library's choice of code, is then rounded away."""
        angles = (np.arange(num_positions, dtype=np.float32)[:, None] * self._frequencies).astype(np.float64)
        return (self._factor * np.cos(angles)).astype(np.float32), (self._factor * np.sin(angles)).astype(np.float32)


class HeadSplitter:
    """Takes the fused projections apart into heads, and readies those of q and k for attention.

    `q_norm` and `k_norm` [head_dim] are weights of an RMSNorm over each head, before it turns; they round as
    those of `RMSNorm` do. `rotary` turns the first part of each head, as much as its `Rope` says, pairing i with
    i + dim / 2; without it nothing turns.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary: RotaryEmbedding | None,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        self._num_heads, self._num_kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        self._rotary = rotary
        self._q_norm, self._k_norm, self._eps = q_norm, k_norm, eps

    def __call__(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`qkv` [rows, (heads + 2 * kv_heads) * head_dim], `positions` int64 [rows], within the rotary's reach
        -> q [rows, heads, head_dim], k and v [rows, kv_heads, head_dim]"""
        rows = qkv.shape[0]
        q = qkv.new_empty(rows, self._num_heads, self._head_dim)
        k = qkv.new_empty(rows, self._num_kv_heads, self._head_dim)
        v = torch.empty_like(k)
        none = qkv.new_empty(0)
        launch(
            layer_kernels.split_heads,
            qkv.numel(),
            as_numpy(qkv),
            positions.numpy(),
            *self._tables(positions),
            as_numpy(none if self._q_norm is None else self._q_norm),
            as_numpy(none if self._k_norm is None else self._k_norm),
            self._eps,
            as_numpy(q),
            as_numpy(k),
            as_numpy(v),
        )
        return q, k, v

    def _tables(self, positions: Tensor) -> tuple[np.ndarray, np.ndarray]:
        if self._rotary is not None:
            return self._rotary.cos, self._rotary.sin
        nothing = np.empty((int(positions.max()) + 1, 0), dtype=np.float32)
        return nothing, nothing


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[rows, 2 * n], gate before up -> silu(gate) * up, [rows, n]"""
    return _gated(layer_kernels.silu_and_mul, gate_up)


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """[rows, 2 * n], gate before up -> gelu(gate) * up, [rows, n], with the tanh approximation of gelu"""
    return _gated(layer_kernels.gelu_tanh_and_mul, gate_up)


def clamped_swiglu(gate_up: Tensor) -> Tensor:
    """[rows, 2 * n], gate before up -> gate * sigmoid(1.702 * gate) * (up + 1), [rows, n], with the gate at most 7
    and up between -7 and 7, as in gpt-oss"""
    return _gated(layer_kernels.clamped_swiglu, gate_up)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": silu_and_mul,
    "gelu_tanh": gelu_tanh_and_mul,
    "clamped_swiglu": clamped_swiglu,
}


def _gated(kernel: Callable[..., Any], gate_up: Tensor) -> Tensor:
    product = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    launch(kernel, 4 * product.numel(), as_numpy(gate_up), as_numpy(product))
    return product


def _frequencies(rope: Rope, freq_factors: Tensor | None) -> Tensor:
    """[rope.dim / 2]: by how much each pair's angle grows from one position to the next, in radians."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    frequencies = 1.0 / rope.theta**exponents
    if freq_factors is not None:
        return frequencies / freq_factors.float()
    if rope.scaling is None:
        return frequencies
    kept = _kept(frequencies, rope, rope.scaling)
    return frequencies * kept + frequencies / rope.scaling.factor * (1.0 - kept)


def _kept(frequencies: Tensor, rope: Rope, scaling: RopeScaling) -> Tensor:
    """How much of each frequency stays as it is, in [0, 1]; what remains is divided by the factor."""
    if scaling.kind == "linear":
        return torch.zeros_like(frequencies)
    if scaling.kind == "llama3":
        turns = scaling.original_context_length * frequencies / (2 * math.pi)  # per original context
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return kept.clamp(0.0, 1.0)
    first, last = _yarn_blend(rope, scaling)
    return 1.0 - ((torch.arange(len(frequencies), dtype=torch.float32) - first) / (last - first)).clamp(0.0, 1.0)


def _yarn_blend(rope: Rope, scaling: RopeScaling) -> tuple[float, float]:
    """Between which pairs YaRN goes over from kept frequencies to divided ones: those that make `beta_fast` and
    `beta_slow` turns per original context."""

    def pair_of(turns: float) -> float:
        return rope.dim * math.log(scaling.original_context_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    return first, last if last != first else first + 0.001  # a step, not a division by zero
