"""The real weights on real text: as surprised as transformers is, to four digits."""

from __future__ import annotations

import math
from pydoc_data import topics

import pytest
import torch

from springtide.core.store import ModelFiles
from springtide.text.tokenizer import Tokenizer
from tests.engine.checkpoints import all_logits, loaded
from tests.engine.reference import llama_of

pytestmark = pytest.mark.model

WINDOW = 512
WINDOWS = 4


def text_windows(files: ModelFiles) -> list[list[int]]:
    """English about Python, which every Python brings."""
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = Tokenizer.load(files).encode(text[: 8 * WINDOW * WINDOWS])
    return [ids[at : at + WINDOW] for at in range(0, WINDOW * WINDOWS, WINDOW)]


def perplexity(logits: list[torch.Tensor], windows: list[list[int]]) -> float:
    losses = [
        torch.nn.functional.cross_entropy(scores[:-1].double(), torch.tensor(ids[1:]), reduction="none")
        for scores, ids in zip(logits, windows, strict=True)
    ]
    return math.exp(torch.cat(losses).mean())


def test_perplexity_equals_transformers_to_four_digits(default_model: ModelFiles) -> None:
    windows = text_windows(default_model)
    ours = perplexity([all_logits(loaded(default_model), ids, chunk=200) for ids in windows], windows)
    model = llama_of(default_model)
    with torch.inference_mode():
        theirs = perplexity([model(torch.tensor([ids])).logits[0] for ids in windows], windows)
    assert f"{ours:.4g}" == f"{theirs:.4g}"
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert 2 < ours < 40  # a language model at work, not noise
