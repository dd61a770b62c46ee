"""Running sequences through an engine, for tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from springtide.core.engine_api import Engine, SequenceRequest, TokenScore
from springtide.core.request import SamplingParams


@dataclass
class Result:
    """All that one sequence gave."""

    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int = field(default=0, compare=False)


def random_prompt(seed: int, length: int, *, below: int = 307) -> list[int]:
    return np.random.default_rng(seed).integers(0, below, length).tolist()


def request(
    name: str,
    prompt: list[int],
    *,
    choice: int = 0,
    output: list[int] | None = None,
    stop_ids: tuple[int, ...] = (),
    priority: int = 0,
    salt: str | None = "",
    **sampling: Any,
) -> SequenceRequest:
    return SequenceRequest(
        id=name,
        prompt=prompt,
        sampling=SamplingParams(**sampling).check(),
        choice=choice,
        output=output or [],
        stop_ids=stop_ids,
        priority=priority,
        cache_salt=salt,
    )


def run(engine: Engine, *requests: SequenceRequest) -> dict[str, Result]:
    """Add them all and step until all are done."""
    results = {}
    for each in requests:
        engine.add(each)
        results[each.id] = Result()
    while engine.has_work():
        for output in engine.step():
            result = results[output.id]
            assert result.finish_reason is None, "nothing may follow the end"
            assert not (result.tokens and output.cached_tokens), "told with the first output"
            result.cached_tokens += output.cached_tokens
            result.tokens += output.token_ids
            result.scores += output.scores or []
            result.finish_reason, result.error = output.finish_reason, output.error
    assert all(result.finish_reason for result in results.values())
    return results
