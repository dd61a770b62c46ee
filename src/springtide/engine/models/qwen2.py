"""Qwen 2 and 2.5, and the dense models distilled from R1 onto them: biases on queries, keys and values."""

from __future__ import annotations

from springtide.engine.models.config import LayerConfig, ModelConfig
from springtide.engine.models.decoder import Decoder
from springtide.engine.models.family import Family
from springtide.engine.models.reading import RawConfig, read_common, read_rope, sliding_layers
from springtide.engine.weights.gguf import GGUFNames


def read_config(raw: RawConfig) -> ModelConfig:
    return read_common(raw, layers=read_layers(raw), attention_bias=True)


def read_layers(raw: RawConfig) -> list[LayerConfig]:
    """All layers see everything, but for the upper ones of the few models that ask for a window there."""
    first_sliding = int(raw.get("max_window_layers", 28))
    sliding = sliding_layers(raw, lambda index: bool(raw.get("use_sliding_window")) and index >= first_sliding)
    rope = read_rope(raw)
    return [LayerConfig(rope, window=int(raw["sliding_window"]) if slides else None) for slides in sliding]


FAMILY = Family(read_config, Decoder, GGUFNames("qwen2"))
