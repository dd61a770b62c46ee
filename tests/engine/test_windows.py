"""Where every layer looks back over a window only, memory behind it is free: for others, and for the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from springtide.core.store import ModelFiles
from springtide.engine.config import EngineConfig
from springtide.engine.llm_engine import LLMEngine
from tests.engine.checkpoints import saved
from tests.engine.families import VOCAB, WINDOW, gemma3, mistral
from tests.engine.harness import random_prompt, request, run

MOST_BLOCKS = -(-(WINDOW + 15) // 16) + 1  # a window that lies as badly as it can, and a block that is begun


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return saved(mistral(), tmp_path_factory.mktemp("mistral"))


def load(model: ModelFiles, num_blocks: int, **options: object) -> LLMEngine:
    return LLMEngine.from_files(
        model, EngineConfig.from_options({"dtype": "float32", "num_blocks": num_blocks, **options})
    )


def test_a_long_answer_holds_no_more_than_its_window(sliding: ModelFiles) -> None:
    engine = load(sliding, 16)
    engine.add(request("a", random_prompt(1, 40, below=VOCAB), max_tokens=200, ignore_eos=True))
    engine.step()
    while engine.has_work():
        assert 16 - engine.load().blocks_free <= MOST_BLOCKS
        engine.step()


@pytest.mark.parametrize(
    "options", [{}, {"drafter": "ngram"}, {"max_num_batched_tokens": 7}, {"attention": "reference"}]
)
def test_what_was_freed_was_never_missed(sliding: ModelFiles, options: dict[str, object]) -> None:
    """A pool in which all could not run at once if they kept all: tokens are those of a large one."""
    asked = [
        request(f"{i}", random_prompt(i, 60, below=VOCAB), seed=i, max_tokens=100, ignore_eos=True, logprobs=1)
        for i in range(5)
    ]
    small = load(sliding, 20, **options)
    expected = run(load(sliding, 100, attention=options.get("attention", "auto")), *asked)
    assert run(small, *asked) == expected
    assert run(small, *asked) == expected  # from what is still cached of the first time
    after = small.load()
    assert (after.running, after.blocks_free) == (0, 20)


def test_a_model_with_a_layer_that_sees_all_keeps_all(tmp_path: Path) -> None:
    engine = load(saved(gemma3(), tmp_path / "gemma"), 16)
    engine.add(request("a", random_prompt(1, 100, below=VOCAB), max_tokens=5, ignore_eos=True))
    engine.step()
    assert 16 - engine.load().blocks_free == 7
