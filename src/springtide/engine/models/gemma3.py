"""Gemma 3, text: five layers of a window to one that sees all, each kind with its own rotation; norms that add one
to their weight, on both sides; head norms; scaled embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from springtide.core.errors import SetupError
from springtide.engine.models.config import LayerConfig, ModelConfig, Rope
from springtide.engine.models.decoder import Attention, Builder, Decoder, SandwichLayer
from springtide.engine.models.family import Family
from springtide.engine.models.reading import RawConfig, head_dim, read_common, read_rope, sliding_layers
from springtide.engine.weights.gguf import GGUFNames

_PATTERN = 6  # every sixth layer sees all


def read_config(raw: RawConfig) -> ModelConfig:
    for feature in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if raw.get(feature):
            raise SetupError(f"a Gemma with {feature} is not supported")
    return read_common(
        raw,
        layers=_layers(raw),
        activation="gelu_pytorch_tanh",
        attention_scale=_scale(raw),
        attention_output_bias=bool(raw.get("attention_bias", False)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", True)),
    )


def _scale(raw: RawConfig) -> float:
    """What scores are multiplied by. GGUF files leave it unsaid: it goes by the size of a head, and in the largest
    model, the one of 62 layers, by a head's share of the hidden size."""
    share = int(raw["hidden_size"]) // int(raw["num_attention_heads"])
    unsaid = share if int(raw["num_hidden_layers"]) == 62 else head_dim(raw)
    return 1.0 / math.sqrt(raw.get("query_pre_attn_scalar") or unsaid)


def _layers(raw: RawConfig) -> list[LayerConfig]:
    pattern = int(raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or _PATTERN)
    everywhere = LayerConfig(read_rope(raw, kind="full_attention", theta=1e6))
    nearby = LayerConfig(_nearby_rope(raw), window=int(raw["sliding_window"]))
    return [nearby if slides else everywhere for slides in sliding_layers(raw, lambda i: (i + 1) % pattern != 0)]


def _nearby_rope(raw: RawConfig) -> Rope:
    """Layers with a window are never stretched. Older files name just their theta, or nothing."""
    if "sliding_attention" in (raw.get("rope_parameters") or {}):
        return read_rope(raw, kind="sliding_attention")
    return Rope(float(raw.get("rope_local_base_freq") or 10_000.0), head_dim(raw))


class Gemma3Layer(SandwichLayer):
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )

    def make_attention(self, build: Builder) -> Attention:
        return Attention(build, head_norms=True)


class Gemma3(Decoder):
    layer = Gemma3Layer
    norm_offset = 1.0

    def embed(self, token_ids: Tensor) -> Tensor:
        scale = torch.tensor(self.config.hidden_size**0.5).to(self.embedding.dtype)  # rounded, as it was in training
        return super().embed(token_ids) * scale


FAMILY = Family(
    read_config,
    Gemma3,
    GGUFNames(
        "gemma3",
        extra={
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
    ),
)
