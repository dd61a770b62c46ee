"""Llama 2 and 3, and what is built like them (SmolLM2, Yi): the plain decoder."""

from __future__ import annotations

from springtide.engine.models.config import ModelConfig
from springtide.engine.models.decoder import Decoder
from springtide.engine.models.family import Family
from springtide.engine.models.reading import RawConfig, read_common
from springtide.engine.weights.gguf import GGUFNames


def read_config(raw: RawConfig) -> ModelConfig:
    return read_common(
        raw,
        attention_output_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
    )


FAMILY = Family(read_config, Decoder, GGUFNames("llama", rotated_pairs=True))
