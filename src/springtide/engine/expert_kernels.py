"""Which experts a row goes to, compiled for CPU: a row to a thread, so that no row feels another. Scores are float32
or bits of bfloat16; all arithmetic is float32."""
# Numba infers the types of kernels:
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from springtide.engine.jit import FUSED, LOG2_E, exp2, njit, prange, to_f32


@njit(parallel=True, fastmath=FUSED)
def choose_experts(scores, renormalise, chosen, weights):
    """scores [rows, experts]; chosen int64 and weights float32 [rows, per_token], best first. A weight is the expert's
    share of the softmax over all of them, or, renormalised, over the chosen ones."""
    num_rows, num_experts = scores.shape
    per_token = chosen.shape[1]
    for row in prange(num_rows):
        taken = np.zeros(num_experts, dtype=np.bool_)
        for place in range(per_token):
            best = _best(scores[row], taken)
            taken[best] = True
            chosen[row, place] = best
        highest = to_f32(scores[row, chosen[row, 0]])
        total = np.float32(0.0)
        for expert in range(num_experts):
            if taken[expert] or not renormalise:
                total += _exp(to_f32(scores[row, expert]) - highest)
        for place in range(per_token):
            weights[row, place] = _exp(to_f32(scores[row, chosen[row, place]]) - highest) / total


@njit
def _best(scores, taken):
    """The highest score that is not taken; of equal ones the first, so that there is one even among NaNs."""
    best = -1
    for expert in range(len(scores)):
        if not taken[expert] and (best < 0 or to_f32(scores[expert]) > to_f32(scores[best])):
            best = expert
    return best


@njit(fastmath=FUSED)
def _exp(x):
    return exp2(x * np.float32(LOG2_E))
