"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from springtide.engine.models.config import Experts, ModelConfig
from springtide.engine.models.decoder import Builder, Decoder, FeedForward, Layer
from springtide.engine.models.experts import separate_experts
from springtide.engine.models.family import Family
from springtide.engine.models.reading import RawConfig, read_common, uniform_layers
from springtide.engine.weights.gguf import GGUFNames

_WITHIN = "block_sparse_moe."


def read_config(raw: RawConfig) -> ModelConfig:
    experts = Experts(
        count=int(raw["num_local_experts"]),
        per_token=int(raw["num_experts_per_tok"]),
        intermediate_size=int(raw["intermediate_size"]),
    )
    return read_common(raw, layers=uniform_layers(raw, window=raw.get("sliding_window"), experts=experts))


class MixtralLayer(Layer):
    def make_mlp(self, build: Builder) -> FeedForward:
        return separate_experts(build, _WITHIN, gate="w1", up="w3", down="w2")


class Mixtral(Decoder):
    layer = MixtralLayer


_EXPERT = f"{_WITHIN}experts.{{e}}."

FAMILY = Family(
    read_config,
    Mixtral,
    GGUFNames(
        "llama",
        extra={
            "ffn_gate_inp": f"{_WITHIN}gate",
            "ffn_gate_exps": f"{_EXPERT}w1",
            "ffn_up_exps": f"{_EXPERT}w3",
            "ffn_down_exps": f"{_EXPERT}w2",
        },
        rotated_pairs=True,
        mixture=True,
    ),
)
