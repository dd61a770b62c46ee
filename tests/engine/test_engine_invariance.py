"""One seed, one text: alone, in company, chunked in any way, preempted, cached, drafted. Bit for bit, logprobs too."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from springtide.core.engine_api import SequenceRequest
from springtide.core.store import ModelFiles
from springtide.engine.config import EngineConfig
from springtide.engine.llm_engine import LLMEngine
from tests.engine.harness import Result, random_prompt, request, run

LENGTHS = (1, 2, 3, 4, 7, 15, 16, 17, 31, 33, 40, 48, 63, 64, 65, 90, 100)

WAYS: dict[str, dict[str, Any]] = {
    "chunks of 7": {"max_num_batched_tokens": 7},
    "chunks of 64": {"max_num_batched_tokens": 64},
    "chunks of 512": {"max_num_batched_tokens": 512},
    "few seats": {"max_num_seqs": 3},
    "little memory": {"num_blocks": 14},
    "five threads": {"threads": 5},
    "prompt lookup": {"drafter": "ngram"},
}

FEW_WAYS = ("chunks of 7", "little memory", "prompt lookup")


def company(vocab: int, most_tokens: int) -> list[SequenceRequest]:
    """17 sequences, no two sampled alike."""
    return [
        request(
            f"s{i}",
            random_prompt(i, length, below=vocab),
            seed=i,
            temperature=(0.0, 0.7, 1.0)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            frequency_penalty=(0.0, 0.0, 0.3)[i % 3],
            max_tokens=most_tokens,
            ignore_eos=True,
            logprobs=3,
        )
        for i, length in enumerate(LENGTHS)
    ]


def alone(engine: LLMEngine, requests: list[SequenceRequest]) -> dict[str, Result]:
    results = {}
    for each in requests:
        results |= run(engine, each)
    return results


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@functools.cache
def tiny_alone(tiny_model: ModelFiles, dtype: str, attention: str) -> dict[str, Result]:
    engine = LLMEngine.from_files(tiny_model, EngineConfig(dtype=dtype, attention=attention))  # type: ignore[arg-type]
    return alone(engine, company(307, 20))


# The reference is slow, and computes one row after the other: what could be wrong there lies round it.
ALL_WAYS = [(attention, way) for attention, ways in (("numba", WAYS), ("reference", FEW_WAYS)) for way in ways]


@pytest.mark.parametrize(("attention", "way"), ALL_WAYS)
def test_company_changes_no_bit(tiny_model: ModelFiles, dtype: str, attention: str, way: str) -> None:
    expected = tiny_alone(tiny_model, dtype, attention)
    config = EngineConfig.from_options({"dtype": dtype, "attention": attention, **WAYS[way]})
    engine = LLMEngine.from_files(tiny_model, config)
    assert run(engine, *company(307, 20)) == expected
    again = run(engine, *company(307, 20))  # now with what is cached of the first time
    assert again == expected
    assert any(result.cached_tokens for result in again.values()) or way == "little memory"
    if way == "little memory":
        assert engine.load().preemptions > 0


@pytest.mark.model
def test_the_real_model_keeps_every_bit_too(default_model: ModelFiles, dtype: str) -> None:
    requests = company(49_152, 8)[2:10:2]  # four sequences
    expected = alone(load(default_model, dtype), requests)
    assert run(load(default_model, dtype), *requests) == expected
    hard = load(default_model, dtype, max_num_batched_tokens=7, num_blocks=4)
    assert run(hard, *requests) == expected
    assert hard.load().preemptions > 0


def load(model: ModelFiles, dtype: str, **options: Any) -> LLMEngine:
    return LLMEngine.from_files(model, EngineConfig.from_options({"dtype": dtype, "num_blocks": 100, **options}))
