"""Keyed sampling, compiled: which token a row of scores gives, without any state between calls.

The noise of a token is a hash of (seed, choice, output position, token id). Adding Gumbel noise to scaled scores
and taking the largest draws from their softmax; with keyed noise the draw can be repeated anywhere, in any
batch. Noise is added to the survivors of top-k, top-p and min-p only.
"""
# Numba infers the types of kernels:
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import numpy as np

from springtide.engine.jit import FASTMATH, LOG2_E, exp2, njit, prange

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: steps that fill the range evenly
_BLOCK = 64  # tokens that are ruled out by one bound
_BUCKETS = 512  # of scores, by how far below the peak; so that a cut needs to sort one bucket, not a vocabulary
_BUCKETS_PER_UNIT = 8.0


@njit(parallel=True)
def sample_rows(scores, rows, temperatures, top_ks, top_ps, min_ps, seeds, choices, positions):
    """Token ids [len(rows)] for `scores[rows]` (float32 [*, vocab], no NaN, something above -inf in every row);
    the other arrays have one entry for each of `rows`. Temperature 0 is greedy. Ties go to the lower id."""
    tokens = np.empty(len(rows), dtype=np.int64)
    for i in prange(len(rows)):
        key = stream_key(seeds[i], choices[i], positions[i])
        tokens[i] = _sample_row(scores[rows[i]], temperatures[i], top_ks[i], top_ps[i], min_ps[i], key)
    return tokens


@njit(parallel=True)
def score_rows(logits, rows, num_top):
    """For `logits[rows]`: the logarithm of each row's sum of exponentials, float64 [len(rows)], and the ids of its
    `num_top` highest, int64 [len(rows), num_top], best first; of equals, the lower id first."""
    normalisers = np.empty(len(rows))
    top_ids = np.empty((len(rows), num_top), dtype=np.int64)
    for i in prange(len(rows)):
        row = logits[rows[i]]
        peak = np.float64(_maximum(row))
        exponentials = np.empty(len(row), dtype=np.float32)
        _exponentiate(row, peak, 1.0, exponentials)
        normalisers[i] = peak + math.log(_sum(exponentials))
        if num_top > 0:
            ids = _top_k(row, np.arange(len(row)), peak, num_top)
            order = np.argsort(-row[ids], kind="mergesort")
            for rank in range(num_top):
                top_ids[i, rank] = ids[order[rank]]
    return normalisers, top_ids


@njit
def stream_key(seed, choice, position):
    """The 64-bit key of one draw. Each part is mixed in by itself, so near seeds or positions share nothing."""
    key = _mix(np.uint64(seed) + _GOLDEN)
    key = _mix(key ^ (np.uint64(choice) + _GOLDEN))
    return _mix(key ^ (np.uint64(position) + _GOLDEN))


@njit
def gumbel(key, token):
    """Standard Gumbel noise, float64, of one token in the draw of `key`."""
    return -math.log(-math.log(_uniform(key, token)))


@njit
def _uniform(key, token):
    """In (0, 1), in steps of 2**-53: never 0, never 1."""
    bits = _mix(key + np.uint64(token) * _GOLDEN)
    return (np.float64(bits >> np.uint64(12)) + 0.5) * 2.0**-52


@njit
def _mix(x):
    """splitmix64's finaliser: each bit of the result hangs on every bit of `x`."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit
def _sample_row(scores, temperature, top_k, top_p, min_p, key):
    top = np.argmax(scores)
    if temperature == 0.0:
        return top
    peak = np.float64(scores[top])
    floor = temperature * math.log(min_p) if min_p > 0.0 else -np.inf  # p >= min_p * p(top), in scores below the peak
    if (top_k == 0 or top_k >= len(scores)) and top_p >= 1.0:
        return _race_all(scores, top, floor, temperature, key)
    ids = np.arange(len(scores))
    if min_p > 0.0:
        ids = ids[scores - peak >= floor]
    if 0 < top_k < len(ids):
        ids = _top_k(scores, ids, peak, top_k)
    if top_p < 1.0:
        ids = _nucleus(scores, ids, peak, temperature, top_p)
    return _race(scores, ids, peak, temperature, key)


@njit
def _race(scores, ids, peak, temperature, key):
    """The id, of those in `ids` (ascending or not), whose noisy score is the highest."""
    winner, best = ids[0], -np.inf
    for token in ids:
        value = (scores[token] - peak) / temperature + gumbel(key, token)
        if value > best or (value == best and token < winner):
            winner, best = token, value
    return winner


@njit
def _race_all(scores, top, floor, temperature, key):
    """As `_race` over all tokens not below `floor`; most are ruled out by their hash, without a logarithm.

    A token at scaled score z beats `best` only if its uniform is above exp(-exp(z - best)). That is worked out
    once for the highest z of a block.
    """
    peak = np.float64(scores[top])
    winner, best = top, gumbel(key, top)
    for start in range(0, len(scores), _BLOCK):
        end = min(start + _BLOCK, len(scores))
        highest = (_maximum(scores[start:end]) - peak) / temperature
        threshold = math.exp(-math.exp(highest - best)) - 1e-15  # a little less, for rounding
        for token in range(start, end):
            if _uniform(key, token) >= threshold:
                below_peak = scores[token] - peak
                value = below_peak / temperature + gumbel(key, token)
                if below_peak >= floor and (value > best or (value == best and token < winner)):
                    winner, best = token, value
    return winner


@njit(fastmath=FASTMATH)
def _maximum(values):
    highest = values[0]
    for value in values:
        highest = max(highest, value)
    return highest


@njit
def _top_k(scores, ids, peak, k):
    """The k of `ids` (ascending) with the highest scores."""
    return _cut(scores, ids, np.ones(len(ids), dtype=np.float32), peak, _BUCKETS_PER_UNIT, float(k))


@njit
def _nucleus(scores, ids, peak, temperature, top_p):
    """The fewest of `ids` that hold `top_p` of their probability, likeliest first."""
    weights = np.empty(len(ids), dtype=np.float32)
    _exponentiate(scores[ids], peak, temperature, weights)
    return _cut(scores, ids, weights, peak, _BUCKETS_PER_UNIT / temperature, top_p * _sum(weights))


@njit
def _cut(scores, ids, weights, peak, buckets_per_unit, wanted):
    """The fewest of `ids`, highest scores first, whose weights reach `wanted`; of equals, those first in `ids`. In
    the result, equals keep their order."""
    buckets = np.empty(len(ids), dtype=np.int64)
    masses = np.zeros(_BUCKETS)
    for i in range(len(ids)):
        buckets[i] = min((peak - scores[ids[i]]) * buckets_per_unit, _BUCKETS - 1.0)
        masses[buckets[i]] += weights[i]
    last, mass = 0, 0.0  # the bucket in which the cut falls, and what lies above it
    while last < _BUCKETS - 1 and mass + masses[last] < wanted:
        mass += masses[last]
        last += 1
    inside = np.nonzero(buckets == last)[0]
    inside = inside[np.argsort(-scores[ids[inside]], kind="mergesort")]
    count = 0
    while count < len(inside) and mass < wanted:
        mass += weights[inside[count]]
        count += 1
    return np.concatenate((ids[buckets < last], ids[inside[:count]]))


@njit(fastmath=FASTMATH)
def _exponentiate(scores, peak, temperature, out):
    """exp((scores - peak) / temperature) as float32."""
    scale, top = np.float32(LOG2_E / temperature), np.float32(peak)
    for i in range(len(scores)):
        out[i] = exp2((scores[i] - top) * scale)


@njit
def _sum(values):
    """In float64, in eight interleaved parts: as good as one, and not bound by the latency of an addition."""
    parts = np.zeros(8)
    whole = len(values) // 8 * 8
    for i in range(0, whole, 8):
        for lane in range(8):
            parts[lane] += values[i + lane]
    total = 0.0
    for lane in range(8):
        total += parts[lane]
    for i in range(whole, len(values)):
        total += values[i]
    return total
