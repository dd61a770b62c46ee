"""Qwen 3: no biases, and a norm over each head of queries and keys."""

from __future__ import annotations

from springtide.engine.models.config import ModelConfig
from springtide.engine.models.decoder import Attention, Builder, Decoder, Layer
from springtide.engine.models.family import Family
from springtide.engine.models.qwen2 import read_layers
from springtide.engine.models.reading import RawConfig, read_common
from springtide.engine.weights.gguf import GGUFNames


def read_config(raw: RawConfig) -> ModelConfig:
    bias = bool(raw.get("attention_bias", False))
    return read_common(raw, layers=read_layers(raw), attention_bias=bias, attention_output_bias=bias)


class Qwen3Layer(Layer):
    def make_attention(self, build: Builder) -> Attention:
        return Attention(build, head_norms=True)


class Qwen3(Decoder):
    layer = Qwen3Layer


FAMILY = Family(read_config, Qwen3, GGUFNames("qwen3"))
