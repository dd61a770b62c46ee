"""The pieces between the products, compiled for CPU: one pass over memory each, a row to a thread.

torch's own elementwise operations split their work by elements, and compute an element at the edge of a split
by other code than one inside: with a row width that is no multiple of a vector, a row's bits then depend on the
rows beside it. Here a row is one loop from its first element, whoever runs it. Arrays are float32 or bits of
bfloat16; all arithmetic is float32, rounded to the arrays' type where transformers rounds.

A sum of two products may not be FUSED: which of them keeps its full length is then the compiler's whim, and it
has another when it loads a kernel than when it has just compiled it.
"""
# Numba infers the types of kernels:
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import numpy as np

from springtide.engine.jit import FUSED, LOG2_E, exp2, from_f32, njit, prange, to_f32

_GELU_INNER = 2.0 * math.sqrt(2.0 / math.pi)  # twice what stands inside the tanh: see `gelu_tanh_and_mul`
_GELU_CUBIC = 0.044715
_SWIGLU_LIMIT = np.float32(7.0)
_SWIGLU_ALPHA = np.float32(1.702)


@njit(parallel=True, fastmath=FUSED)
def rms_norm(x, weight, eps, out):
    """x and out [rows, n], weight [n]"""
    for row in prange(len(x)):
        _normalise(x[row], weight, eps, out[row])


@njit(fastmath=FUSED)
def _normalise(values, weight, eps, out):
    """What is normed is rounded to the weight's type before the product: with float32 weights, not at all."""
    width = len(values)
    scale = np.float32(1.0) / np.sqrt(_sum_of_squares(values) / np.float32(width) + np.float32(eps))
    for i in range(width):
        normed = from_f32(to_f32(values[i]) * scale, weight[i])
        out[i] = from_f32(to_f32(normed) * to_f32(weight[i]), values[i])


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


@njit(parallel=True)  # not FUSED: for `_turn`, which is inlined
def split_heads(qkv, positions, cos, sin, q_norm, k_norm, eps, q, k, v):
    """qkv [rows, (heads + 2 * kv_heads) * dim] into q [rows, heads, dim], k and v [rows, kv_heads, dim].

    The heads of q and k are normed with q_norm and k_norm [dim], or [0] for none; then the first dimensions of
    each turn by their row's angles: cos and sin [context, rotated dimensions / 2].
    """
    num_rows, num_heads, dim = q.shape
    num_kv_heads = k.shape[1]
    for row in prange(num_rows):
        heads = qkv[row].reshape(-1, dim)
        c, s = cos[positions[row]], sin[positions[row]]
        for head in range(num_heads):
            _place_head(heads[head], q_norm, eps, c, s, q[row, head])
        for head in range(num_kv_heads):
            _place_head(heads[num_heads + head], k_norm, eps, c, s, k[row, head])
            for d in range(dim):
                v[row, head, d] = heads[num_heads + num_kv_heads + head, d]


@njit
def _place_head(head, norm, eps, cos, sin, out):
    if len(norm) > 0:
        _normalise(head, norm, eps, out)
    else:
        for d in range(len(head)):
            out[d] = head[d]
    _turn(out, cos, sin)


@njit
def _turn(head, cos, sin):
    """The pairs (i, i + len(cos)), in place."""
    half = len(cos)
    for i in range(half):
        first, second = to_f32(head[i]), to_f32(head[half + i])
        head[i] = from_f32(first * cos[i] - second * sin[i], head[i])
        head[half + i] = from_f32(second * cos[i] + first * sin[i], head[half + i])


@njit(parallel=True, fastmath=FUSED)
def silu_and_mul(gate_up, out):
    """gate_up [rows, 2 * n], gate before up; out [rows, n] = gate * sigmoid(gate) * up"""
    num_rows, width = out.shape
    for row in prange(num_rows):
        for i in range(width):
            gate = to_f32(gate_up[row, i])
            activated = from_f32(gate * _sigmoid(gate), gate_up[row, i])
            out[row, i] = from_f32(to_f32(activated) * to_f32(gate_up[row, width + i]), gate_up[row, i])


@njit(parallel=True, fastmath=FUSED)
def gelu_tanh_and_mul(gate_up, out):
    """gate_up [rows, 2 * n], gate before up; out [rows, n] = gate * (1 + tanh(y)) / 2 * up with
    y = sqrt(2 / pi) * (gate + 0.044715 * gate ** 3); and (1 + tanh(y)) / 2 is sigmoid(2 * y)."""
    num_rows, width = out.shape
    for row in prange(num_rows):
        for i in range(width):
            gate = to_f32(gate_up[row, i])
            doubled = np.float32(_GELU_INNER) * (gate + np.float32(_GELU_CUBIC) * gate * gate * gate)
            activated = from_f32(gate * _sigmoid(doubled), gate_up[row, i])
            out[row, i] = from_f32(to_f32(activated) * to_f32(gate_up[row, width + i]), gate_up[row, i])


@njit(parallel=True, fastmath=FUSED)
def clamped_swiglu(gate_up, out):
    """gate_up [rows, 2 * n], gate before up; out [rows, n] = gate * sigmoid(1.702 * gate) * (up + 1), the gate at
    most 7, up between -7 and 7."""
    num_rows, width = out.shape
    for row in prange(num_rows):
        for i in range(width):
            gate, up = to_f32(gate_up[row, i]), to_f32(gate_up[row, width + i])
            # Comparisons that are false of a NaN, and leave it.
            gate = _SWIGLU_LIMIT if gate > _SWIGLU_LIMIT else gate
            up = _SWIGLU_LIMIT if up > _SWIGLU_LIMIT else up
            up = -_SWIGLU_LIMIT if up < -_SWIGLU_LIMIT else up
            activated = from_f32(gate * _sigmoid(_SWIGLU_ALPHA * gate), gate_up[row, i])
            lifted = from_f32(up + np.float32(1.0), gate_up[row, i])
            out[row, i] = from_f32(to_f32(activated) * to_f32(lifted), gate_up[row, i])


@njit(fastmath=FUSED)
def _sigmoid(x):
    fallen = exp2(-abs(x) * np.float32(LOG2_E))  # exp(-|x|): never overflows
    return (np.float32(1.0) if x >= 0 else fallen) / (np.float32(1.0) + fallen)
