"""Mistral: Llama, of which some versions see just a window in every layer."""

from __future__ import annotations

from springtide.engine.models.config import ModelConfig
from springtide.engine.models.decoder import Decoder
from springtide.engine.models.family import Family
from springtide.engine.models.reading import RawConfig, read_common, uniform_layers


def read_config(raw: RawConfig) -> ModelConfig:
    return read_common(raw, layers=uniform_layers(raw, window=raw.get("sliding_window")))


FAMILY = Family(read_config, Decoder)  # GGUF files call it llama
