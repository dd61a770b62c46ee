"""The pieces between the products, compiled for CPU: one pass over memory each, a row to a thread.

torch's own elementwise operations split their work by elements, and compute an element at the edge of a split
by other code than one inside: with a row width that is no multiple of a vector, a row's bits then depend on the
rows beside it. Here a row is one loop from its first element, whoever runs it. Arrays are float32 or bits of
bfloat16; all arithmetic is float32, rounded to the arrays' type where transformers rounds.
"""
# Numba infers the types of kernels:
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from springtide.engine.jit import FUSED, LOG2_E, exp2, from_f32, njit, prange, to_f32


@njit(parallel=True, fastmath=FUSED)
def rms_norm(x, weight, eps, out):
    """x and out [rows, n], weight [n]"""
    num_rows, width = x.shape
    for row in prange(num_rows):
        scale = np.float32(1.0) / np.sqrt(_sum_of_squares(x[row]) / np.float32(width) + np.float32(eps))
        for i in range(width):
            normed = from_f32(to_f32(x[row, i]) * scale, x[row, i])
            out[row, i] = from_f32(to_f32(normed) * to_f32(weight[i]), x[row, i])


@njit(fastmath=FUSED)
def _sum_of_squares(values):
    """In sixteen interleaved parts: one vector of sums."""
    parts = np.zeros(16, dtype=np.float32)
    whole = len(values) // 16 * 16
    for start in range(0, whole, 16):
        for lane in range(16):
            value = to_f32(values[start + lane])
            parts[lane] += value * value
    total = np.float32(0.0)
    for lane in range(16):
        total += parts[lane]
    for i in range(whole, len(values)):
        value = to_f32(values[i])
        total += value * value
    return total


@njit(parallel=True, fastmath=FUSED)
def silu_and_mul(gate_up, out):
    """gate_up [rows, 2 * n], gate before up; out [rows, n] = silu(gate) * up"""
    num_rows, width = out.shape
    for row in prange(num_rows):
        for i in range(width):
            gate = to_f32(gate_up[row, i])
            fallen = exp2(-abs(gate) * np.float32(LOG2_E))  # exp(-|gate|): never overflows
            sigmoid = (np.float32(1.0) if gate >= 0 else fallen) / (np.float32(1.0) + fallen)
            activated = from_f32(gate * sigmoid, gate_up[row, i])
            out[row, i] = from_f32(to_f32(activated) * to_f32(gate_up[row, width + i]), gate_up[row, i])


@njit(parallel=True, fastmath=FUSED)
def split_and_rotate(qkv, positions, cos, sin, q, k, v):
    """qkv [rows, (heads + 2 * kv_heads) * dim] into q [rows, heads, dim], k and v [rows, kv_heads, dim], q and k
    turned by their rows' angles: cos and sin [context, dim / 2]."""
    num_rows, num_heads, dim = q.shape
    num_kv_heads = k.shape[1]
    for row in prange(num_rows):
        c, s = cos[positions[row]], sin[positions[row]]
        for head in range(num_heads):
            _rotate(qkv[row, head * dim : (head + 1) * dim], c, s, q[row, head])
        for head in range(num_kv_heads):
            at = (num_heads + head) * dim
            _rotate(qkv[row, at : at + dim], c, s, k[row, head])
            at += num_kv_heads * dim
            for d in range(dim):
                v[row, head, d] = qkv[row, at + d]


@njit(fastmath=FUSED)
def _rotate(head, cos, sin, out):
    half = len(cos)
    for i in range(half):
        first, second = to_f32(head[i]), to_f32(head[half + i])
        out[i] = from_f32(first * cos[i] - second * sin[i], head[i])
        out[half + i] = from_f32(second * cos[i] + first * sin[i], head[i])
