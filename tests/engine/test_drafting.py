"""Drafts change how many steps an answer takes, and not one bit of it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.core.engine_api import SequenceRequest
from springtide.core.errors import SetupError
from springtide.core.store import ModelFiles
from springtide.engine.config import EngineConfig
from springtide.engine.drafting.base import Drafter
from springtide.engine.drafting.ngram import NgramDrafter
from springtide.engine.drafting.registry import choose_drafter
from springtide.engine.llm_engine import LLMEngine
from springtide.engine.loading import load_runner
from tests.engine.harness import Result, random_prompt, request, run

MAX_TOKENS = 40
VOCAB = 307


class Oracle:
    """Knows what will come, and is wrong at random."""

    def __init__(self, answers: dict[str, list[int]], *, wrong: float) -> None:
        self._answers = answers
        self._wrong = wrong
        self._rng = np.random.default_rng(0)
        self.forgotten: set[str] = set()

    def propose(self, sequence_id: str, tokens: Sequence[int], most: int) -> list[int]:
        answer = self._answers[sequence_id]
        known = next(n for n in range(len(answer), -1, -1) if n == 0 or list(tokens[-n:]) == answer[:n])
        ahead = answer[known : known + most]
        return [(token + (self._rng.random() < self._wrong)) % VOCAB for token in ahead]

    def forget(self, sequence_id: str) -> None:
        self.forgotten.add(sequence_id)


def load(model: ModelFiles, drafter: Drafter | None, **options: Any) -> LLMEngine:
    config = EngineConfig.from_options({"dtype": "float32", "num_blocks": 200, **options})
    return LLMEngine(load_runner(model, config), config, drafter, model=model.name, digest=model.digest)


def all_kinds() -> list[SequenceRequest]:
    """Every option by which a token is chosen, or an answer ends."""
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "sampled": {},
        "nucleus": {"top_p": 0.8, "top_k": 40},
        "min-p": {"min_p": 0.05, "temperature": 0.6},
        "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
        "greedy penalties": {"temperature": 0.0, "repetition_penalty": 1.5},
        "bias": {"logit_bias": {5: 4.0, 7: -4.0}},
        "many ends": {"stop_ids": tuple(range(0, VOCAB, 20))},
        "ends after a while": {"stop_ids": tuple(range(100)), "min_tokens": 11},
        "stop tokens": {"stop_token_ids": tuple(range(1, VOCAB, 20)), "ignore_eos": True},
        "short": {"max_tokens": 3},
        "one": {"max_tokens": 1},
        "not cached": {"salt": None},
    }
    return [
        request(
            name,
            random_prompt(number, 5 + 9 * number),
            **{"seed": number, "max_tokens": MAX_TOKENS, "logprobs": 2, **options},
        )
        for number, (name, options) in enumerate(kinds.items())
    ]


@pytest.fixture(scope="module")
def undrafted(tiny_model: ModelFiles) -> dict[str, dict[str, Result]]:
    """By the attention that was used: two backends need not agree to the last bit."""
    return {name: run(load(tiny_model, None, attention=name), *all_kinds()) for name in ("numba", "reference")}


WAYS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "long drafts": {"draft_tokens": 30},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "few seats": {"max_num_seqs": 3},
    "little memory": {"num_blocks": 16},
    "reference": {"attention": "reference"},
}


# Each way with drafts of which most come true, and what is told apart below: all and none of them.
@pytest.mark.parametrize(
    ("way", "wrong"), [*((way, 0.2) for way in WAYS), ("roomy", 0.0), ("roomy", 1.0), ("little memory", 1.0)]
)
def test_a_drafter_changes_no_bit(
    tiny_model: ModelFiles, undrafted: dict[str, dict[str, Result]], way: str, wrong: float
) -> None:
    options = {"attention": "numba", **WAYS[way]}
    expected = undrafted[options["attention"]]
    oracle = Oracle({name: result.tokens for name, result in expected.items()}, wrong=wrong)
    engine = load(tiny_model, oracle, **options)
    assert run(engine, *all_kinds()) == expected
    assert oracle.forgotten == set(expected)
    after = engine.load()
    assert (after.running, after.blocks_free) == (0, after.blocks_total)
    if way == "roomy":
        assert (after.steps < 10) == (wrong == 0.0)
    if way == "little memory":
        assert after.preemptions > 0
    assert run(engine, *all_kinds()) == expected  # what was cached meanwhile is right, too


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompt_lookup_changes_no_bit(tiny_model: ModelFiles, dtype: str) -> None:
    repeating = random_prompt(1, 9) * 5
    asked = [request(f"{seed}", repeating, seed=seed, temperature=0.4, max_tokens=MAX_TOKENS) for seed in range(6)]
    asked.append(request("greedy", repeating, temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True))
    plain, drafting = (
        LLMEngine.from_files(tiny_model, EngineConfig.from_options({"dtype": dtype, "num_blocks": 200, **options}))
        for options in ({}, {"drafter": "ngram", "draft_tokens": 5})
    )
    assert run(drafting, *asked) == run(plain, *asked)


def test_steps_are_saved_where_drafts_come_true(tiny_model: ModelFiles) -> None:
    prompt = random_prompt(1, 20)
    asked = request("a", prompt, seed=1, max_tokens=17, ignore_eos=True)
    answer = run(load(tiny_model, None), asked)["a"].tokens
    engine = load(tiny_model, Oracle({"a": answer}, wrong=0.0))
    engine.add(asked)
    steps = []
    while engine.has_work():
        [output] = engine.step()
        steps.append(output.token_ids)
    assert [len(tokens) for tokens in steps] == [1, 8, 8]
    assert [token for tokens in steps for token in tokens] == answer


def test_an_end_inside_a_run_of_drafts_cuts_it_there(tiny_model: ModelFiles) -> None:
    asked: dict[str, Any] = {"seed": 1, "max_tokens": 12, "logprobs": 1}
    prompt = random_prompt(1, 20)
    free = run(load(tiny_model, None), request("a", prompt, **asked))["a"]
    end = free.tokens[5]
    cut = free.tokens.index(end) + 1
    engine = load(tiny_model, Oracle({"a": free.tokens}, wrong=0.0), draft_tokens=11)
    result = run(engine, request("a", prompt, stop_token_ids=(end,), **asked))["a"]
    assert (result.tokens, result.finish_reason) == (free.tokens[:cut], "stop")
    assert result.scores == free.scores[:cut]
    assert engine.load().steps == 2


def test_a_sequence_that_breaks_behind_a_draft_ends_as_it_would_have(tiny_model: ModelFiles, tmp_path: Path) -> None:
    shutil.copytree(tiny_model.path, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.embed_tokens.weight"][300] = math.nan  # breaks whoever draws it, one token later
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    model = ModelFiles(name="hole", source="", path=tmp_path / "model", format="safetensors", digest="sha256:1")
    asked = request("a", random_prompt(1, 20, below=300), seed=1, max_tokens=MAX_TOKENS, logit_bias={300: 4.0})
    broken = run(load(model, None), asked)["a"]
    assert broken.finish_reason == "error" and len(broken.tokens) > 2 and broken.tokens[-1] == 300
    oracle = Oracle({"a": [*broken.tokens, 1, 2, 3, 4]}, wrong=0.0)
    assert run(load(model, oracle), asked)["a"] == broken


def test_a_cancelled_sequence_is_forgotten(tiny_model: ModelFiles) -> None:
    oracle = Oracle({"a": [1] * 30}, wrong=0.0)
    engine = load(tiny_model, oracle)
    engine.add(request("a", [1, 2, 3], max_tokens=30))
    engine.step()
    engine.cancel("a")
    assert oracle.forgotten == {"a"} and not engine.has_work()
    assert engine.load().blocks_free == 200


def test_an_unknown_drafter_is_refused() -> None:
    with pytest.raises(SetupError, match=r"wrong value.*drafter"):
        EngineConfig.from_options({"drafter": "crystal ball"})
    with pytest.raises(SetupError, match="no drafter 'crystal ball'"):
        choose_drafter("crystal ball")


# ---- prompt lookup


def propose(tokens: list[int], most: int) -> list[int]:
    return NgramDrafter().propose("a", tokens, most)


def test_what_followed_before_is_proposed_again() -> None:
    assert propose([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]


def test_the_longest_run_that_came_before_decides() -> None:
    assert propose([9, 1, 2, 3, 50, 1, 2, 3, 60, 7, 9, 1, 2, 3], 1) == [50]  # four tokens, though three came later


def test_of_equal_runs_the_latest_decides() -> None:
    assert propose([1, 2, 50, 1, 2, 60, 1, 2], 1) == [60]


def test_a_loop_goes_round_as_often_as_is_asked() -> None:
    assert propose([1, 2, 3, 1, 2, 3, 1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]


def test_without_a_repetition_nothing_is_proposed() -> None:
    assert propose([1, 2, 3, 4, 5, 5], 4) == []
    assert propose([1], 4) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9), st.data())
def test_proposals_hang_on_the_tokens_alone(tokens: list[int], most: int, data: st.DataObject) -> None:
    """Not on when it was asked before; and they are what followed the latest of the longest repeated runs."""
    drafter = NgramDrafter()
    for length in sorted(data.draw(st.sets(st.integers(1, len(tokens))))):
        drafter.propose("a", tokens[:length], most)
    assert drafter.propose("a", tokens, most) == naive(tokens, most)
    drafter.forget("a")
    assert drafter.propose("a", [7], most) == []


def naive(tokens: list[int], most: int) -> list[int]:
    for length in (4, 3, 2):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                copied = list(tokens)
                for source in range(end, end + most):
                    copied.append(copied[source])
                return copied[len(tokens) :]
    return []
