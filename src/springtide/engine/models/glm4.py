"""GLM-4: half of each head turns, in interleaved pairs; gate and up come as one matrix. The 0414 models (Glm4) have
a second norm behind attention and feed-forward, the first 9B one (Glm) has not."""

from __future__ import annotations

from springtide.engine.linear import Linear
from springtide.engine.models.config import ModelConfig
from springtide.engine.models.decoder import Builder, Decoder, FeedForward, GatedMLP, Layer, SandwichLayer
from springtide.engine.models.family import Family
from springtide.engine.models.reading import RawConfig, read_common, read_rope, uniform_layers
from springtide.engine.weights.gguf import GGUFNames


def read_config(raw: RawConfig) -> ModelConfig:
    # Files that name no share mean a half.
    rope = read_rope({"partial_rotary_factor": 0.5, **raw}, interleaved=True)
    return read_common(raw, layers=uniform_layers(raw, rope=rope))


class GlmMLP(GatedMLP):
    def project_up(self, build: Builder, within: str) -> Linear:
        return build.linear(within, {"gate_up_proj": 2 * build.config.intermediate_size}, build.config.hidden_size)


class GlmLayer(Layer):
    def make_mlp(self, build: Builder) -> FeedForward:
        return GlmMLP(build)


class Glm(Decoder):
    layer = GlmLayer


class Glm4Layer(SandwichLayer):
    norms = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")

    def make_mlp(self, build: Builder) -> FeedForward:
        return GlmMLP(build)


class Glm4(Decoder):
    layer = Glm4Layer


GLM = Family(read_config, Glm)
FAMILY = Family(
    read_config,
    Glm4,
    GGUFNames(
        "glm4",
        extra={
            "post_attention_norm": "post_self_attn_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
            "ffn_up": "mlp.gate_up_proj",
        },
    ),
)
