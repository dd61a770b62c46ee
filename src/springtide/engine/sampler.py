"""Which token comes next, from a row of logits and what was asked. Stateless: rows know nothing of each other.

The order is vLLM's: banned tokens and `logit_bias`, then repetition, frequency and presence penalties, then
temperature, min-p, top-k, top-p, then the draw (`sampler_kernels.py`). Log-probabilities are those of the raw
logits, before any of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from springtide.core.engine_api import TokenScore
from springtide.core.request import SamplingParams
from springtide.engine.jit import launch
from springtide.engine.sampler_kernels import sample_rows, score_rows


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What one row of logits is sampled with. (`seed`, `choice`, `position`) key the noise: `position` counts
    the sequence's output tokens from 0. `counts`, which only penalties look at, has every token of prompt and
    output, and how often it came in the output. `banned` tokens can't be drawn (stop tokens before `min_tokens`)."""

    sampling: SamplingParams
    seed: int
    choice: int
    position: int
    counts: Mapping[int, int]
    banned: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class SampleError:
    """Row `row` of the call has no next token, and why. Other rows are unharmed."""

    row: int
    reason: str


_COLDEST = 1e-5  # below it only the peak is left, and a division by it may give what is no number

SampleResult: TypeAlias = tuple[int, TokenScore | None] | SampleError


def penalises(sampling: SamplingParams) -> bool:
    """Whether tokens that were there before are drawn with other odds."""
    s = sampling
    return s.repetition_penalty != 1.0 or s.frequency_penalty != 0.0 or s.presence_penalty != 0.0


def sample(logits: np.ndarray, rows: Sequence[SampleRow]) -> list[SampleResult]:
    """For each row of `logits` (float32 [rows, vocab], left as it is) the next token, and its scores if
    `sampling.logprobs` asks for them.

    Greedy (temperature 0, or as good as that) takes the highest score, of equals the lowest id.
    """
    results: dict[int, SampleResult] = {}
    plain: list[int] = []
    adjusted: dict[int, np.ndarray] = {}
    finite = np.isfinite(logits).all(axis=1)
    for i, row in enumerate(rows):
        if not finite[i]:
            results[i] = SampleError(i, "the model's scores are not finite numbers")
        elif not _changes_scores(row):
            plain.append(i)
        else:
            scores = _adjusted(logits[i], row)
            highest = scores.max()
            if np.isneginf(highest):
                results[i] = SampleError(i, "every token is banned")
            elif not np.isfinite(highest):  # not a number in there makes the maximum one
                results[i] = SampleError(i, "the penalties are so strong that scores are no numbers any more")
            else:
                adjusted[i] = scores

    drawn = _draw(logits, plain, [rows[i] for i in plain])
    if adjusted:
        stacked = np.stack(list(adjusted.values()))
        drawn |= zip(adjusted, _draw(stacked, range(len(stacked)), [rows[i] for i in adjusted]).values(), strict=True)
    token_scores = _token_scores(logits, drawn, rows)
    results |= {i: (token, token_scores.get(i)) for i, token in drawn.items()}
    return [results[i] for i in range(len(rows))]


def warm_up(vocab_size: int) -> None:
    """Sample in every way that has code of its own, so that all of it is compiled."""
    ways = (
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(top_p=0.9, top_k=20, min_p=0.01),
        SamplingParams(presence_penalty=1.0),
        SamplingParams(logprobs=1),
    )
    rows = [SampleRow(way, seed=0, choice=0, position=1, counts={0: 1}) for way in ways]
    sample(np.zeros((len(rows), vocab_size), dtype=np.float32), rows)


def _draw(scores: np.ndarray, which: Sequence[int], rows: Sequence[SampleRow]) -> dict[int, int]:
    """The drawn token of each of the rows `which` of `scores`."""
    if not rows:
        return {}
    params = [row.sampling for row in rows]
    temperatures = np.array([p.temperature for p in params], dtype=np.float64)
    temperatures[temperatures < _COLDEST] = 0.0
    tokens = launch(
        sample_rows,
        (len(rows) - 1) * scores.shape[1],
        scores,
        np.array(which, dtype=np.int64),
        temperatures,
        np.array([p.top_k for p in params], dtype=np.int64),
        np.array([p.top_p for p in params], dtype=np.float64),
        np.array([p.min_p for p in params], dtype=np.float64),
        np.array([row.seed for row in rows], dtype=np.int64),
        np.array([row.choice for row in rows], dtype=np.int64),
        np.array([row.position for row in rows], dtype=np.int64),
    )
    return dict(zip(which, tokens.tolist(), strict=True))


def _changes_scores(row: SampleRow) -> bool:
    return penalises(row.sampling) or bool(row.banned) or bool(row.sampling.logit_bias)


def _adjusted(logits: np.ndarray, row: SampleRow) -> np.ndarray:
    """A copy of one row with bans, bias and penalties applied."""
    s = row.sampling
    scores = logits.copy()
    for token, bias in s.logit_bias.items():
        scores[token] += bias
    scores[list(row.banned)] = -np.inf
    if penalises(s):
        with np.errstate(all="ignore"):  # the caller looks at what comes out
            _penalise(scores, s, row.counts)
    return scores


def _penalise(scores: np.ndarray, s: SamplingParams, counts: Mapping[int, int]) -> None:
    seen = np.fromiter(counts.keys(), dtype=np.int64, count=len(counts))
    produced = np.fromiter(counts.values(), dtype=np.int64, count=len(counts))  # how often
    penalised = scores[seen]
    if s.repetition_penalty != 1.0:
        penalised = np.where(penalised > 0, penalised / s.repetition_penalty, penalised * s.repetition_penalty)
    penalised -= (s.frequency_penalty * produced).astype(np.float32)
    penalised -= np.float32(s.presence_penalty) * (produced > 0)
    scores[seen] = penalised


def _token_scores(logits: np.ndarray, tokens: Mapping[int, int], rows: Sequence[SampleRow]) -> dict[int, TokenScore]:
    """Natural log-probabilities of the drawn `tokens` (by row) and of the likeliest, for the rows that want them."""
    wanted = {i: num_top for i in tokens if (num_top := rows[i].sampling.logprobs) is not None}
    if not wanted:
        return {}
    most = min(max(wanted.values()), logits.shape[1])
    work = (len(wanted) - 1) * logits.shape[1]
    normalisers, top_ids = launch(score_rows, work, logits, np.array(list(wanted), dtype=np.int64), most)
    scores: dict[int, TokenScore] = {}
    for (i, num_top), normaliser, likeliest in zip(wanted.items(), normalisers.tolist(), top_ids, strict=True):
        top = [(token, float(logits[i, token]) - normaliser) for token in likeliest[:num_top].tolist()]
        scores[i] = TokenScore(tokens[i], float(logits[i, tokens[i]]) - normaliser, top)
    return scores
