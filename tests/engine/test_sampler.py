"""The sampler draws from the distribution that was asked for, the same token each time, a row at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.core.engine_api import TokenScore
from springtide.core.request import SamplingParams
from springtide.engine.sampler import SampleError, SampleRow, sample

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def row(
    *,
    seed: int = 0,
    choice: int = 0,
    position: int = 0,
    prompt: Iterable[int] = (),
    output: Iterable[int] = (),
    banned: Iterable[int] = (),
    **sampling: Any,
) -> SampleRow:
    return SampleRow(
        sampling=SamplingParams(**sampling).check(),
        seed=seed,
        choice=choice,
        position=position,
        counts=dict.fromkeys(prompt, 0) | Counter(output),
        banned=frozenset(banned),
    )


def token(logits: Iterable[float], row: SampleRow) -> int:
    (result,) = sample(np.array([logits], dtype=np.float32), [row])
    assert not isinstance(result, SampleError)
    return result[0]


# --- the same, written the slow and obvious way ---


def naive_token(logits: np.ndarray, row: SampleRow) -> int:
    scores = naive_scores(logits, row)
    s = row.sampling
    likeliest_first = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if s.temperature == 0:
        return likeliest_first[0]
    peak = float(scores[likeliest_first[0]])
    survivors = [i for i in likeliest_first if s.min_p == 0 or scores[i] - peak >= s.temperature * math.log(s.min_p)]
    survivors = survivors[: s.top_k] if s.top_k else survivors
    masses = [math.exp((float(scores[i]) - peak) / s.temperature) for i in survivors]
    count = next((n for n in range(1, len(masses)) if sum(masses[:n]) >= s.top_p * sum(masses)), len(masses))
    survivors = survivors[:count] if s.top_p < 1 else survivors
    return max(sorted(survivors), key=lambda i: (float(scores[i]) - peak) / s.temperature + naive_gumbel(row, i))


def naive_scores(logits: np.ndarray, row: SampleRow) -> np.ndarray:
    s = row.sampling
    scores = logits.copy()
    for i, bias in s.logit_bias.items():
        scores[i] += np.float32(bias)
    for i in row.banned:
        scores[i] = -np.inf
    for i, count in row.counts.items():
        penalty = np.float32(s.repetition_penalty)
        scores[i] = scores[i] / penalty if scores[i] > 0 else scores[i] * penalty
        if count:
            scores[i] -= np.float32(s.frequency_penalty * count)
            scores[i] -= np.float32(s.presence_penalty)
    return scores


def naive_gumbel(row: SampleRow, token: int) -> float:
    key = naive_mix(row.seed + _GOLDEN)
    key = naive_mix(key ^ (row.choice + _GOLDEN))
    key = naive_mix(key ^ (row.position + _GOLDEN))
    uniform = ((naive_mix(key + token * _GOLDEN) >> 12) + 0.5) * 2.0**-52
    return -math.log(-math.log(uniform))


def naive_mix(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, SampleRow]:
    vocab = draw(st.integers(2, 200))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.5, 3.0, 30.0]))
    logits = (rng.standard_normal(vocab) * scale).astype(np.float32)
    if draw(st.booleans()):
        logits = np.round(logits)  # ties
    ids = st.integers(0, vocab - 1)
    return logits, row(
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        choice=draw(st.integers(0, 127)),
        position=draw(st.integers(0, 10_000)),
        prompt=draw(st.lists(ids, max_size=8)),
        output=draw(st.lists(ids, max_size=8)),
        banned=draw(st.sets(ids, max_size=min(3, vocab - 1))),
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 1, 2, 10, 1000])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.5, 0.01])),
        min_p=draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.7, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.5, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.5, -0.5])),
        logit_bias=draw(st.dictionaries(ids, st.floats(-100, 100, width=32), max_size=3)),
    )


@settings(max_examples=400, deadline=None)
@given(cases())
def test_every_option_equals_the_naive_way(case: tuple[np.ndarray, SampleRow]) -> None:
    logits, row = case
    assert token(logits, row) == naive_token(logits, row)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([{}, {"top_p": 0.9}, {"top_k": 300, "top_p": 0.8}, {"min_p": 0.001}]))
def test_a_large_vocabulary_equals_the_naive_way(seed: int, sampling: dict[str, Any]) -> None:
    """Whole blocks are ruled out without a look at their noise; the winner must be among the rest."""
    logits = (np.random.default_rng(seed).standard_normal(5003) * 2).astype(np.float32)
    asked = row(seed=seed, **sampling)
    assert token(logits, asked) == naive_token(logits, asked)


# --- the distribution ---

PROBABILITIES = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
DRAWS = 20_000
CHI_SQUARE_1_PERCENT = {1: 6.635, 2: 9.210, 3: 11.345, 5: 15.086}  # by degrees of freedom


def chi_square(rows: list[SampleRow], expected: np.ndarray) -> float:
    """Pearson's statistic of one draw for each row from PROBABILITIES; what is expected never must never come."""
    logits = np.tile(np.log(PROBABILITIES).astype(np.float32), (len(rows), 1))
    drawn = [result[0] for result in sample(logits, rows) if not isinstance(result, SampleError)]
    counts, wanted = np.bincount(drawn, minlength=len(expected)), expected * len(rows)
    assert not counts[expected == 0].any()
    possible = expected > 0
    return float(((counts - wanted)[possible] ** 2 / wanted[possible]).sum())


def test_draws_follow_the_softmax_over_seeds_positions_and_choices() -> None:
    for rows in (
        [row(seed=i) for i in range(DRAWS)],
        [row(seed=7, position=i) for i in range(DRAWS)],
        [row(seed=i // 100, choice=i % 100) for i in range(DRAWS)],
        [row(seed=i << 40) for i in range(DRAWS)],
    ):
        assert chi_square(rows, PROBABILITIES) < CHI_SQUARE_1_PERCENT[5]


@pytest.mark.parametrize(
    ("sampling", "expected", "freedom"),
    [
        ({"temperature": 0.5}, PROBABILITIES**2, 5),
        ({"top_k": 3}, [0.4, 0.25, 0.15, 0, 0, 0], 2),
        ({"top_p": 0.7}, [0.4, 0.25, 0.15, 0, 0, 0], 2),
        ({"min_p": 0.5}, [0.4, 0.25, 0, 0, 0, 0], 1),
        ({"top_k": 4, "top_p": 0.95}, [0.4, 0.25, 0.15, 0.1, 0, 0], 3),
        ({"top_k": 4, "top_p": 0.7}, [0.4, 0.25, 0, 0, 0, 0], 1),  # of the four's mass, two hold 72 %
    ],
)
def test_draws_follow_what_is_left(sampling: dict[str, Any], expected: list[float], freedom: int) -> None:
    left = np.array(expected) / np.sum(expected)
    rows = [row(seed=11, position=i, **sampling) for i in range(DRAWS)]
    assert chi_square(rows, left) < CHI_SQUARE_1_PERCENT[freedom]


def test_neighbouring_positions_are_independent() -> None:
    """Pairs of draws at positions 2i and 2i + 1 of a fair coin: all four outcomes alike."""
    results = sample(np.zeros((DRAWS, 2), dtype=np.float32), [row(seed=3, position=i) for i in range(DRAWS)])
    coins = np.array([result[0] for result in results if not isinstance(result, SampleError)])
    counts = np.bincount(2 * coins[::2] + coins[1::2], minlength=4)
    wanted = DRAWS / 2 / 4
    assert ((counts - wanted) ** 2 / wanted).sum() < CHI_SQUARE_1_PERCENT[3]


# --- rows ---


def test_rows_know_nothing_of_each_other() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((40, 1000)).astype(np.float32) * 4
    rows = [
        row(
            seed=i,
            position=i,
            temperature=(0.0, 1.0, 0.8)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            presence_penalty=(0.0, 0.0, 0.5)[i % 3],
            output=[i],
            logprobs=i % 4 or None,
        )
        for i in range(40)
    ]
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(40)]
    backwards = sample(logits[::-1].copy(), rows[::-1])[::-1]
    assert together == alone == backwards


def test_a_row_that_is_not_finite_is_reported_and_others_go_on() -> None:
    logits = np.zeros((5, 8), dtype=np.float32)
    logits[:, 3] = 5
    logits[1, 2], logits[2, 2], logits[3, 2] = math.nan, math.inf, -math.inf
    results = sample(logits, [row(temperature=0.0) for _ in range(5)])
    assert [isinstance(result, SampleError) for result in results] == [False, True, True, True, False]
    assert results[0] == results[4] == (3, None)
    assert results[1] == SampleError(1, "the model's scores are not finite numbers")


def test_a_row_with_every_token_banned_is_reported() -> None:
    results = sample(np.zeros((2, 3), dtype=np.float32), [row(banned={0, 1, 2}), row(banned={0, 1})])
    assert results == [SampleError(0, "every token is banned"), (2, None)]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-20, 1e-6])
@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.5}, {"top_k": 5, "top_p": 0.9}])
def test_hardly_any_temperature_is_greedy(temperature: float, sampling: dict[str, Any]) -> None:
    logits = np.random.default_rng(1).standard_normal((1, 500)).astype(np.float32)
    ((drawn, _),) = sample(logits, [row(temperature=temperature, **sampling)])  # type: ignore[misc]
    assert drawn == logits[0].argmax()


def test_a_penalty_that_leaves_no_numbers_ends_its_row_alone() -> None:
    logits = np.full((3, 8), 20, dtype=np.float32)
    # Far below what a request may ask for: the sampler must hold all the same.
    tiny = [SamplingParams(top_p=0.9, repetition_penalty=penalty) for penalty in (1e-40, 1e-46)]
    rows = [
        replace(row(prompt=[3]), sampling=tiny[0]),
        replace(row(prompt=[3], banned={3}), sampling=tiny[1]),
        row(temperature=0.0),
    ]
    results = sample(logits, rows)
    assert [isinstance(result, SampleError) for result in results] == [True, True, False]
    assert "no numbers" in str(results[0])


def test_no_rows_give_no_tokens() -> None:
    assert sample(np.zeros((0, 8), dtype=np.float32), []) == []


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert token([1, 7, 7, 3], row(temperature=0.0)) == 1
    assert token([1, 7, 7, 3], row(top_k=1)) == 1


def test_logits_are_left_as_they_are() -> None:
    logits = np.arange(8, dtype=np.float32)[None]
    sample(logits, [row(presence_penalty=1.0, output=[3], logit_bias={2: 5.0}, banned={7})])
    assert np.array_equal(logits[0], np.arange(8))


# --- log-probabilities ---


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = (np.random.default_rng(5).standard_normal((1, 3000)) * 5).astype(np.float32)
    asked = row(seed=1, temperature=0.5, top_k=5, logit_bias={7: 50.0}, logprobs=4)
    ((drawn, score),) = sample(logits, [asked])  # type: ignore[misc]
    wide = logits[0].astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum())
    assert drawn == 7
    assert isinstance(score, TokenScore)
    assert score.token_id == 7
    assert score.logprob == pytest.approx(expected[7], abs=1e-6)
    best = np.argsort(-wide)[:4]
    assert [id for id, _ in score.top] == best.tolist()
    assert [logprob for _, logprob in score.top] == pytest.approx(expected[best].tolist(), abs=1e-6)


@pytest.mark.parametrize(("logprobs", "top"), [(0, []), (2, [1, 3]), (3, [1, 3, 0]), (20, [1, 3, 0, 2])])
def test_alternatives_are_sorted_and_equals_go_by_id(logprobs: int, top: list[int]) -> None:
    logits = np.array([[2, 5, 1, 5]], dtype=np.float32)
    ((_, score),) = sample(logits, [row(temperature=0.0, logprobs=logprobs)])  # type: ignore[misc]
    assert isinstance(score, TokenScore)
    assert [id for id, _ in score.top] == top
