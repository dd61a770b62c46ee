"""Whatever is asked of a small engine at once, each sequence gets what it would have got alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from springtide.core.engine_api import SequenceRequest
from springtide.core.store import ModelFiles
from springtide.engine.config import EngineConfig
from springtide.engine.llm_engine import LLMEngine
from tests.engine.harness import Result, random_prompt, request, run

VOCAB = 307
BEGINNINGS = [random_prompt(seed, 48) for seed in range(3)]

ENGINES: dict[str, dict[str, Any]] = {
    "plain": {"max_num_seqs": 6},
    "small chunks": {"max_num_batched_tokens": 9, "max_num_seqs": 4},
    "drafting": {"drafter": "ngram", "draft_tokens": 4},
    "drafting in small chunks": {"drafter": "ngram", "max_num_batched_tokens": 16, "max_num_seqs": 5},
}


@dataclass(frozen=True)
class Visit:
    """A request that comes before step `arrives`, and may be cancelled so many steps later."""

    request: SequenceRequest
    arrives: int
    cancelled_after: int | None


def of_any_kind(index: int, draw: st.DrawFn) -> SequenceRequest:
    beginning = draw(st.sampled_from(BEGINNINGS))[: draw(st.integers(0, 48))]
    loop = random_prompt(draw(st.integers(0, 5)), 3) * draw(st.integers(0, 4))  # something for drafts to come true
    return request(
        f"r{index}",
        [*beginning, *loop, draw(st.integers(0, VOCAB - 1))],
        choice=draw(st.integers(0, 2)),
        stop_ids=draw(st.sampled_from([(), tuple(range(0, VOCAB, 10))])),
        priority=draw(st.integers(0, 2)),
        salt=draw(st.sampled_from(["", "", "mine", None])),
        seed=draw(st.integers(0, 3)),
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0])),
        top_p=draw(st.sampled_from([1.0, 0.7])),
        top_k=draw(st.sampled_from([0, 5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, 0.8])),
        logprobs=draw(st.sampled_from([None, 0, 2])),
        min_tokens=draw(st.sampled_from([0, 3])),
        max_tokens=draw(st.integers(3, 14)),
    )


@st.composite
def crowds(draw: st.DrawFn) -> list[Visit]:
    return [
        Visit(
            of_any_kind(index, draw),
            arrives=draw(st.integers(0, 10)),
            cancelled_after=draw(st.sampled_from([None, None, None, 0, 1, 5])),
        )
        for index in range(20)
    ]


@pytest.fixture(scope="module")
def engines(tiny_model: ModelFiles) -> dict[str, LLMEngine]:
    """They go on from crowd to crowd, and so does what they have cached. 12 blocks hold few of a crowd at once."""
    return {name: load(tiny_model, num_blocks=12, **options) for name, options in ENGINES.items()}


@pytest.fixture(scope="module")
def quiet(tiny_model: ModelFiles) -> LLMEngine:
    return load(tiny_model, num_blocks=12, max_num_seqs=1)


def load(model: ModelFiles, **options: Any) -> LLMEngine:
    return LLMEngine.from_files(model, EngineConfig.from_options({"dtype": "float32", **options}))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(crowd=crowds(), name=st.sampled_from(sorted(ENGINES)))
def test_a_crowd_gets_what_each_would_get_alone(
    engines: dict[str, LLMEngine], quiet: LLMEngine, crowd: list[Visit], name: str
) -> None:
    engine = engines[name]
    results = received(engine, crowd)
    load_after = engine.load()
    assert (load_after.running, load_after.waiting, load_after.blocks_free) == (0, 0, 12)
    for visit in crowd:
        alone = run(quiet, msgspec.structs.replace(visit.request, cache_salt=None))[visit.request.id]
        result = results[visit.request.id]
        if result.finish_reason is None:  # it was cancelled: what it had got so far is right, too
            assert visit.cancelled_after is not None
            alone = Result(alone.tokens[: len(result.tokens)], alone.scores[: len(result.scores)])
        assert result == alone


def received(engine: LLMEngine, crowd: list[Visit]) -> dict[str, Result]:
    """Let them all come and go."""
    results = {visit.request.id: Result() for visit in crowd}
    step = 0
    while engine.has_work() or step <= max(visit.arrives + (visit.cancelled_after or 0) for visit in crowd):
        for visit in crowd:
            if visit.arrives == step:
                engine.add(visit.request)
            if visit.cancelled_after is not None and visit.arrives + visit.cancelled_after == step:
                engine.cancel(visit.request.id)
        for output in engine.step():
            result = results[output.id]
            assert result.finish_reason is None
            result.tokens += output.token_ids
            result.scores += output.scores or []
            result.finish_reason, result.error = output.finish_reason, output.error
        step += 1
    return results
