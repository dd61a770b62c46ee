"""In float32 the engine says what `transformers` says, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from springtide.core.request import Message
from springtide.core.store import ModelFiles
from springtide.engine.config import EngineConfig
from springtide.engine.llm_engine import LLMEngine
from springtide.text.tokenizer import Tokenizer
from tests.engine.harness import random_prompt, request, run
from tests.engine.reference import greedy, greedy_after, llama_of

MAX_TOKENS = 24

TEXTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Q: What is 17 + 25?\nA:",
    "1, 1, 2, 3, 5, 8,",
    "Der schnellste Weg nach Berlin ist",
    "La mer monte deux fois par jour, parce que",
    "import numpy as np\n\nx = np.",
    "Water boils at",
    "Dear Sir or Madam,\n\n",
    "SELECT name, age FROM",
    "The three laws of robotics are:\n1.",
    "To be, or not to be,",
    "   ",
    "!",
    "E = mc",
    "<html>\n<head>\n<title>",
    "The tide comes in and the tide goes out. " * 12,
    "naïve café – “quotes” … ½ 🌊🌊",
    "今日は天気が",
]
CHATS = ["Name three rivers.", "Write a haiku about spring.", "What is a prime number?", "Say hello in Spanish."]


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """30 of them: texts, chats, and random tokens of several lengths."""
    chats = [tokenizer.render_chat([Message(role="user", content=text)]) for text in CHATS]
    noise = [random_prompt(length, length, below=tokenizer.vocab_size) for length in (1, 2, 16, 17, 100, 300)]
    return [tokenizer.encode(text) for text in TEXTS] + chats + noise


def engine_outputs(files: ModelFiles, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    engine = LLMEngine.from_files(files, EngineConfig.from_options({"dtype": "float32", "num_blocks": 400, **options}))
    asked = [
        request(f"{i}", prompt, max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
        for i, prompt in enumerate(prompts)
    ]
    results = run(engine, *asked)
    return [results[each.id].tokens for each in asked]


@pytest.mark.parametrize("attention", ["reference", "numba"])
def test_a_tiny_model_equals_transformers(tiny_model: ModelFiles, attention: str) -> None:
    reference = LlamaForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float32).eval()
    asked = [random_prompt(length, length) for length in (1, 5, 16, 33, 100, 400)]
    expected = [greedy(reference, prompt, MAX_TOKENS) for prompt in asked]
    assert engine_outputs(tiny_model, asked, attention=attention) == expected


@pytest.mark.model
def test_the_default_model_equals_transformers_on_thirty_prompts(default_model: ModelFiles) -> None:
    asked = prompts(Tokenizer.load(default_model))
    assert len(asked) == 30
    answers = engine_outputs(default_model, asked)
    reference = llama_of(default_model)
    for prompt, answer in zip(asked, answers, strict=True):
        assert greedy_after(reference, prompt, answer) == answer
