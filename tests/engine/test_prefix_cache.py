"""What was computed once is not computed again, and nobody can tell by the tokens."""

from __future__ import annotations

from typing import Any

import pytest

from springtide.core.store import ModelFiles
from springtide.engine.config import EngineConfig
from springtide.engine.llm_engine import LLMEngine
from tests.engine.harness import random_prompt, request, run

SAMPLED: dict[str, Any] = {"seed": 3, "max_tokens": 20, "ignore_eos": True, "logprobs": 2, "presence_penalty": 0.4}


def load(model: ModelFiles, **options: Any) -> LLMEngine:
    return LLMEngine.from_files(model, EngineConfig.from_options({"dtype": "float32", "num_blocks": 64, **options}))


@pytest.fixture
def engine(tiny_model: ModelFiles) -> LLMEngine:
    return load(tiny_model)


@pytest.mark.parametrize(("length", "cached"), [(15, 0), (16, 0), (17, 16), (32, 16), (40, 32), (100, 96)])
def test_a_prompt_that_came_before_runs_just_what_its_full_blocks_lack(
    engine: LLMEngine, length: int, cached: int
) -> None:
    prompt = random_prompt(1, length)
    first = run(engine, request("a", prompt, **SAMPLED))["a"]
    again = run(engine, request("a", prompt, **SAMPLED))["a"]
    assert (first.cached_tokens, again.cached_tokens) == (0, cached)
    assert again == first


@pytest.mark.parametrize("attention", ["reference", "numba"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_next_turn_of_a_chat_finds_the_answer_too(tiny_model: ModelFiles, dtype: str, attention: str) -> None:
    engine = load(tiny_model, dtype=dtype, attention=attention)
    question = random_prompt(1, 37)
    answer = run(engine, request("a", question, **{**SAMPLED, "max_tokens": 40}))["a"].tokens
    conversation = [*question, *answer, *random_prompt(2, 11)]
    second = request("b", conversation, **SAMPLED)
    cached = run(engine, second)["b"]
    assert cached.cached_tokens == 64  # of 77: four full blocks, the last one filled while answering
    uncached = run(engine, request("b", conversation, salt=None, **SAMPLED))["b"]
    assert uncached.cached_tokens == 0
    assert cached == uncached


def test_only_equal_salts_share(engine: LLMEngine) -> None:
    prompt = random_prompt(1, 50)

    def cached(salt: str | None) -> int:
        return run(engine, request("a", prompt, salt=salt, max_tokens=1))["a"].cached_tokens

    assert [cached(salt) for salt in ("one", "two", "one", "two", "", None, None, "")] == [0, 0, 48, 48, 0, 0, 0, 48]


def test_prompts_that_begin_alike_share_the_beginning(engine: LLMEngine) -> None:
    beginning = random_prompt(1, 40)
    run(engine, request("a", beginning + random_prompt(2, 30), max_tokens=1))
    assert run(engine, request("b", beginning + random_prompt(3, 30), max_tokens=1))["b"].cached_tokens == 32


def test_of_many_that_come_together_one_computes_the_beginning(engine: LLMEngine) -> None:
    """And the others wait for it: choices of one prompt, say."""
    prompt = random_prompt(1, 70)
    choices = [request(f"{i}", prompt, choice=i, seed=1, max_tokens=8, ignore_eos=True) for i in range(4)]
    together = run(engine, *choices)
    assert [together[f"{i}"].cached_tokens for i in range(4)] == [0, 64, 64, 64]
    alone = [run(engine, request(f"{i}", prompt, choice=i, seed=1, salt=None, max_tokens=8, ignore_eos=True))
             for i in range(4)]  # fmt: skip
    assert together == {name: result for each in alone for name, result in each.items()}


def test_what_a_sequence_finds_of_itself_after_a_preemption_was_not_cached(tiny_model: ModelFiles) -> None:
    engine = load(tiny_model, num_blocks=9)
    requests = [request(f"{i}", random_prompt(i, 40), seed=i, max_tokens=30, ignore_eos=True) for i in range(3)]
    results = run(engine, *requests)
    assert engine.load().preemptions > 0
    assert [result.cached_tokens for result in results.values()] == [0, 0, 0]


def test_of_a_resumed_sequence_just_the_prompt_counts(engine: LLMEngine) -> None:
    prompt = random_prompt(1, 20)
    whole = run(engine, request("a", prompt, **{**SAMPLED, "max_tokens": 60}))["a"]
    resumed = run(engine, request("a", prompt, output=whole.tokens[:50], **{**SAMPLED, "max_tokens": 60}))["a"]
    assert resumed.cached_tokens == 20
    assert (resumed.tokens, resumed.scores) == (whole.tokens[50:], whole.scores[50:])


def test_the_cache_costs_nobody_memory(tiny_model: ModelFiles) -> None:
    """What is cached goes, the longest unused first, when others need the room."""
    engine = load(tiny_model, num_blocks=8)
    for number in range(5):
        prompt = random_prompt(number, 100)
        assert run(engine, request("a", prompt, max_tokens=1))["a"].cached_tokens == 0
        assert engine.load().blocks_free == 8
        assert run(engine, request("a", prompt, max_tokens=1))["a"].cached_tokens == 96
    assert run(engine, request("a", random_prompt(0, 100), max_tokens=1))["a"].cached_tokens == 0


def test_a_sequence_that_breaks_spoils_no_prefix(engine: LLMEngine) -> None:
    prompt = random_prompt(1, 40)
    broken = request("bad", prompt, stop_ids=tuple(range(307)), min_tokens=3, max_tokens=5)  # all are banned
    assert run(engine, broken)["bad"].finish_reason == "error"
    assert run(engine, request("a", prompt, **SAMPLED)) == run(engine, request("a", prompt, salt=None, **SAMPLED))
