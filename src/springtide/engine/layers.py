"""The pieces between the products: normalisation, rotary positions, gated activation.

All of them work row by row, so no row feels another (`layer_kernels.py`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from springtide.engine import layer_kernels
from springtide.engine.jit import as_numpy, launch
from springtide.engine.models.config import ModelConfig, RopeScaling

_FIRST_POSITIONS = 4096


class RMSNorm:
    """Root-mean-square normalisation, computed in float32. `weight` is [hidden]."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = as_numpy(weight)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, hidden]"""
        normed = torch.empty_like(x)
        launch(layer_kernels.rms_norm, x.numel(), as_numpy(x), self._weight, self._eps, as_numpy(normed))
        return normed


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[rows, 2 * n], gate before up -> silu(gate) * up, [rows, n]"""
    product = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    launch(layer_kernels.silu_and_mul, 4 * product.numel(), as_numpy(gate_up), as_numpy(product))
    return product


class RotaryEmbedding:
    """Turns each half-split pair of a head by an angle that grows with the position.

    The angles' cosines and sines are float32 tables, looked up by position, never recomputed: a position's are
    the same in every batch. `freq_factors` [head_dim / 2], if a file brings them, divide the frequencies in
    place of `rope_scaling`.
    """

    def __init__(self, config: ModelConfig, freq_factors: Tensor | None = None) -> None:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        frequencies = 1.0 / config.rope_theta**exponents
        if freq_factors is not None:
            frequencies = frequencies / freq_factors.float()
        elif config.rope_scaling is not None:
            frequencies = _scaled(frequencies, config.rope_scaling)
        self._frequencies = frequencies.numpy()
        self._num_heads, self._num_kv_heads, self._dim = config.num_heads, config.num_kv_heads, config.head_dim
        self._cos, self._sin = self._tables(_FIRST_POSITIONS)

    def reach(self, position: int) -> None:
        """Make the tables long enough for `position`: few sequences come near a context of millions."""
        if position >= len(self._cos):
            self._cos, self._sin = self._tables(1 << position.bit_length())

    def _tables(self, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
        """[num_positions, head_dim / 2] each. From float64, whose last bit, that of the library's choice of code,
        is then rounded away."""
        angles = (np.arange(num_positions, dtype=np.float32)[:, None] * self._frequencies).astype(np.float64)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def split(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The fused projections [rows, (heads + 2 * kv_heads) * head_dim] as q [rows, heads, head_dim] and k, v
        [rows, kv_heads, head_dim], with q and k turned to `positions` [rows], all within reach."""
        rows = qkv.shape[0]
        q = qkv.new_empty(rows, self._num_heads, self._dim)
        k = qkv.new_empty(rows, self._num_kv_heads, self._dim)
        v = torch.empty_like(k)
        launch(
            layer_kernels.split_and_rotate,
            qkv.numel(),
            as_numpy(qkv),
            positions.numpy(),
            self._cos,
            self._sin,
            as_numpy(q),
            as_numpy(k),
            as_numpy(v),
        )
        return q, k, v


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    waves = scaling.original_context_length * frequencies / (2 * math.pi)  # full turns per original context
    kept = (waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * kept + frequencies / scaling.factor * (1.0 - kept)
