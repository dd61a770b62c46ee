"""gpt-oss: every other layer sees a window, heads have sinks, all projections have biases, and the experts' gate is
clamped. Its experts lie in one tensor for each kind of weight, inputs before outputs, gate and up interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from springtide.core.errors import SetupError
from springtide.engine.linear import Linear
from springtide.engine.models.config import Experts, LayerConfig, ModelConfig
from springtide.engine.models.decoder import Attention, Builder, Decoder, FeedForward, Layer
from springtide.engine.models.experts import MixtureOfExperts, separate_experts
from springtide.engine.models.family import Family
from springtide.engine.models.reading import RawConfig, read_common, read_rope, sliding_layers
from springtide.engine.weights.gguf import GGUFNames

_SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
_GGUF_SINKS = "self_attn.sinks.weight"


def read_config(raw: RawConfig) -> ModelConfig:
    for name, known in _SWIGLU.items():
        if float(raw.get(name, known)) != known:
            raise SetupError(f"a gpt-oss whose {name} is {raw[name]} is not supported", hint=f"supported: {known}")
    bias = bool(raw.get("attention_bias", True))
    return read_common(raw, layers=_layers(raw), attention_bias=bias, attention_output_bias=bias)


def _layers(raw: RawConfig) -> list[LayerConfig]:
    experts = Experts(
        count=int(raw["num_local_experts"]),
        per_token=int(raw["num_experts_per_tok"]),
        intermediate_size=int(raw["intermediate_size"]),
    )
    rope, window = read_rope(raw, theta=150_000.0), int(raw["sliding_window"])
    sliding = sliding_layers(raw, lambda index: index % 2 == 0)
    return [LayerConfig(rope, window if slides else None, experts) for slides in sliding]


class GptOssLayer(Layer):
    def make_attention(self, build: Builder) -> Attention:
        return Attention(build, sinks=_GGUF_SINKS if build.has(_GGUF_SINKS) else "self_attn.sinks")

    def make_mlp(self, build: Builder) -> FeedForward:
        experts, hidden = build.layer.experts, build.config.hidden_size
        assert experts is not None
        if not build.has("mlp.experts.gate_up_proj"):  # GGUF files hold each expert, gate and up apart
            return separate_experts(build, router="router", bias=True, activation="clamped_swiglu")
        inner = experts.intermediate_size
        return MixtureOfExperts(
            experts,
            build.linear("mlp.", {"router": experts.count}, hidden, bias=True),
            _linears(build, "gate_up_proj", experts.count, hidden, 2 * inner, _gates_first),
            _linears(build, "down_proj", experts.count, inner, hidden, Tensor.contiguous),
            activation="clamped_swiglu",
        )


def _linears(
    build: Builder, part: str, count: int, inputs: int, outputs: int, ordered: Callable[[Tensor], Tensor]
) -> Sequence[Linear]:
    """One product for each expert out of a tensor [experts, inputs, outputs] and biases [experts, outputs], its
    outputs `ordered`, as a copy."""
    name = build.name(f"mlp.experts.{part}")
    weights = build.weights.take(name, count, inputs, outputs)
    biases = build.weights.take(f"{name}_bias", count, outputs)
    return [Linear(ordered(weight.t()), ordered(bias)) for weight, bias in zip(weights, biases, strict=True)]


def _gates_first(rows: Tensor) -> Tensor:
    """Rows gate, up, gate, up, ... as all gates above all ups."""
    return rows.view(-1, 2, *rows.shape[1:]).transpose(0, 1).flatten(0, 1).contiguous()


class GptOss(Decoder):
    layer = GptOssLayer


FAMILY = Family(
    read_config,
    GptOss,
    GGUFNames(
        "gpt-oss",
        extra={
            "attn_sinks": "self_attn.sinks",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
        },
        mixture=True,
        implied={"truncate": False},
    ),
)
