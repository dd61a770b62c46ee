"""Models to run: tiny ones with random weights, made on the spot, and the default model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from springtide.core.config import DEFAULT_MODEL
from springtide.core.store import ModelFiles, ModelStore

MODELS = os.environ.get("SPRINGTIDE_TEST_MODELS", str(Path.home() / ".cache" / "springtide-test" / "models"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """A random Llama as a folder without tokenizer. Its sizes are no multiples of any vector's width."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=307,
        hidden_size=60,
        intermediate_size=93,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return ModelFiles(name="tiny", source=str(folder), path=folder, format="safetensors", digest="sha256:" + "0" * 64)


@pytest.fixture(scope="session")
def default_model() -> ModelFiles:
    """The real weights, fetched once. Tests that use it carry the marker `model`."""
    return ModelStore(Path(MODELS)).resolve(DEFAULT_MODEL)
