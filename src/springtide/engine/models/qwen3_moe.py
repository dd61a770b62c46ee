"""Qwen 3 with mixtures of experts: in every layer, but for those that its configuration keeps dense."""

from __future__ import annotations

from springtide.engine.models.config import Experts, LayerConfig, ModelConfig
from springtide.engine.models.decoder import Builder, Decoder, FeedForward
from springtide.engine.models.experts import separate_experts
from springtide.engine.models.family import Family
from springtide.engine.models.qwen3 import Qwen3Layer
from springtide.engine.models.reading import RawConfig, num_layers, read_common, read_rope
from springtide.engine.weights.gguf import GGUFNames


def read_config(raw: RawConfig) -> ModelConfig:
    bias = bool(raw.get("attention_bias", False))
    return read_common(raw, layers=_layers(raw), attention_bias=bias, attention_output_bias=bias)


def _layers(raw: RawConfig) -> list[LayerConfig]:
    experts = Experts(
        count=int(raw.get("num_experts") or raw["num_local_experts"]),
        per_token=int(raw["num_experts_per_tok"]),
        intermediate_size=int(raw["moe_intermediate_size"]),
        renormalise=bool(raw.get("norm_topk_prob", False)),
    )
    dense, every = set(raw.get("mlp_only_layers") or ()), int(raw.get("decoder_sparse_step") or 1)
    rope = read_rope(raw)
    window = int(raw["sliding_window"]) if raw.get("use_sliding_window") else None
    return [
        LayerConfig(rope, window, None if index in dense or (index + 1) % every else experts)
        for index in range(num_layers(raw))
    ]


class Qwen3MoeLayer(Qwen3Layer):
    def make_mlp(self, build: Builder) -> FeedForward:
        if build.layer.experts is None:
            return super().make_mlp(build)
        return separate_experts(build)


class Qwen3Moe(Decoder):
    layer = Qwen3MoeLayer


FAMILY = Family(read_config, Qwen3Moe, GGUFNames("qwen3moe", mixture=True, implied={"norm_topk_prob": True}))
