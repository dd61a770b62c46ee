"""What all families are made of: embedding, layers, norm, head; in a layer, attention and a feed-forward.

A family takes these parts as they are, or overrides the few verbs by which it differs. Parts are built by a
`Builder`, which knows where in the checkpoint a layer lies; once built, they know only tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from springtide.engine.attention.base import AttentionBackend, AttentionLayer, Pages
from springtide.engine.inputs import ForwardInputs
from springtide.engine.layers import ACTIVATIONS, HeadSplitter, RMSNorm, RotaryEmbedding
from springtide.engine.linear import Linear
from springtide.engine.models.config import LayerConfig, ModelConfig, Rope
from springtide.engine.weights.base import ROPE_FREQ_FACTORS, Weights


@dataclass(frozen=True, slots=True)
class Builder:
    """Makes the parts of one layer. `norm_offset` is what a family adds to every norm's weight."""

    config: ModelConfig
    weights: Weights
    index: int
    rotary: RotaryEmbedding | None
    norm_offset: float = 0.0

    @property
    def layer(self) -> LayerConfig:
        return self.config.layers[self.index]

    def name(self, part: str) -> str:
        return f"model.layers.{self.index}.{part}"

    def has(self, part: str) -> bool:
        """Whether the checkpoint has it."""
        return self.name(part) in self.weights

    def norm(self, part: str) -> RMSNorm:
        weight = norm_weight(self.weights, self.name(part), self.config.hidden_size, self.norm_offset)
        return RMSNorm(weight, self.config.norm_eps)

    def head_norm(self, part: str) -> Tensor:
        """The weight [head_dim] of a norm over each head."""
        return norm_weight(self.weights, self.name(part), self.config.head_dim, self.norm_offset)

    def linear(self, within: str, outputs: Mapping[str, int], inputs: int, *, bias: bool = False) -> Linear:
        """Projections of the same input as one product; `outputs` are their names below `within` and their sizes."""
        names = [self.name(f"{within}{part}") for part in outputs]
        weight = self.weights.stack([f"{name}.weight" for name in names], [(n, inputs) for n in outputs.values()])
        if not bias:
            return Linear(weight)
        return Linear(weight, self.weights.stack([f"{name}.bias" for name in names], [(n,) for n in outputs.values()]))


def norm_weight(weights: Weights, name: str, size: int, offset: float) -> Tensor:
    """A norm's weight. With an offset in float32: (1 + w) is rounded only after the product with x."""
    if not offset:
        return weights.take(name, size)
    return weights.take(name, size, dtype=torch.float32).add_(offset)


class FeedForward(Protocol):
    """What stands behind attention in a layer: one gated product, or a mixture of them."""

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, hidden]; no row feels another."""

    def products(self) -> dict[str, Linear]:
        """One product of each shape, by a name that the author of the model would know."""


class Attention:
    """Fused projections, positions, attention over the pages, output projection. `head_norms`: over each head of
    queries and keys, before they turn. `sinks`: the name of one score a head that takes part in every softmax."""

    def __init__(self, build: Builder, *, head_norms: bool = False, sinks: str | None = None) -> None:
        config = build.config
        self.qkv = self.project_qkv(build)
        if build.layer.rope and build.layer.rope.interleaved:
            _pair_halves(self.qkv, config, build.layer.rope)
        self.output = build.linear(
            "self_attn.",
            {"o_proj": config.hidden_size},
            config.num_heads * config.head_dim,
            bias=config.attention_output_bias,
        )
        self._split = HeadSplitter(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            build.rotary,
            q_norm=build.head_norm("self_attn.q_norm.weight") if head_norms else None,
            k_norm=build.head_norm("self_attn.k_norm.weight") if head_norms else None,
            eps=config.norm_eps,
        )
        self._layer = AttentionLayer(
            index=build.index,
            scale=config.attention_scale or config.head_dim**-0.5,
            window=build.layer.window,
            sinks=build.weights.take(build.name(sinks), config.num_heads, dtype=torch.float32) if sinks else None,
        )

    def project_qkv(self, build: Builder) -> Linear:
        """Queries, keys and values of all heads, one below the other."""
        config = build.config
        kv_size = config.num_kv_heads * config.head_dim
        sizes = {"q_proj": config.num_heads * config.head_dim, "k_proj": kv_size, "v_proj": kv_size}
        return build.linear("self_attn.", sizes, config.hidden_size, bias=config.attention_bias)

    def __call__(self, x: Tensor, inputs: ForwardInputs, pool: Pages, attention: AttentionBackend) -> Tensor:
        q, k, v = self._split(self.qkv(x), inputs.positions)
        attended = attention.attend(self._layer, q, k, v, pool, inputs)
        return self.output(attended.view(x.shape[0], -1))

    def products(self) -> dict[str, Linear]:
        return {"qkv": self.qkv, "o_proj": self.output}


class GatedMLP:
    """down(activation(gate(x)) * up(x))"""

    def __init__(self, build: Builder, within: str = "mlp.") -> None:
        config = build.config
        self.gate_up = self.project_up(build, within)
        self.down = build.linear(
            within, {"down_proj": config.hidden_size}, config.intermediate_size, bias=config.mlp_bias
        )
        self._activate = ACTIVATIONS[config.activation]

    def project_up(self, build: Builder, within: str) -> Linear:
        """Gate above up."""
        inner = build.config.intermediate_size
        return build.linear(
            within, {"gate_proj": inner, "up_proj": inner}, build.config.hidden_size, bias=build.config.mlp_bias
        )

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self._activate(self.gate_up(x)))

    def products(self) -> dict[str, Linear]:
        return {"gate_up": self.gate_up, "down_proj": self.down}


class Layer:
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, build: Builder) -> None:
        self.input_norm = build.norm("input_layernorm.weight")
        self.attention = self.make_attention(build)
        self.mlp_norm = build.norm("post_attention_layernorm.weight")
        self.mlp: FeedForward = self.make_mlp(build)

    def make_attention(self, build: Builder) -> Attention:
        return Attention(build)

    def make_mlp(self, build: Builder) -> FeedForward:
        return GatedMLP(build)

    def __call__(self, x: Tensor, inputs: ForwardInputs, pool: Pages, attention: AttentionBackend) -> Tensor:
        x = x + self.attention(self.input_norm(x), inputs, pool, attention)
        return x + self.mlp(self.mlp_norm(x))

    def products(self) -> dict[str, Linear]:
        return self.attention.products() | self.mlp.products()


class SandwichLayer(Layer):
    """A norm on both sides of each half: x + norm(attention(norm(x))), and so on. `norms` are their four names."""

    norms: ClassVar[tuple[str, str, str, str]]

    def __init__(self, build: Builder) -> None:
        self.input_norm, self.attention_norm, self.mlp_norm, self.output_norm = (
            build.norm(f"{name}.weight") for name in self.norms
        )
        self.attention = self.make_attention(build)
        self.mlp = self.make_mlp(build)

    def __call__(self, x: Tensor, inputs: ForwardInputs, pool: Pages, attention: AttentionBackend) -> Tensor:
        x = x + self.attention_norm(self.attention(self.input_norm(x), inputs, pool, attention))
        return x + self.output_norm(self.mlp(self.mlp_norm(x)))


class Decoder:
    """Token ids in, hidden states of the wanted rows out; `logits` turns those into scores.

    Raises:
        SetupError: tensors are missing, left over, or of another shape than `config` says.
    """

    layer: ClassVar[type[Layer]] = Layer
    norm_offset: ClassVar[float] = 0.0

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.embedding = weights.take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self._rotaries = _rotaries(config, weights)
        self.layers = [
            self.layer(Builder(config, weights, index, self._rotary(of), self.norm_offset))
            for index, of in enumerate(config.layers)
        ]
        self._norm = RMSNorm(
            norm_weight(weights, "model.norm.weight", config.hidden_size, self.norm_offset), config.norm_eps
        )
        self._head = Linear(self.head_weight(weights))
        _skip_derived(weights, config)
        weights.finish()

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [rows] -> [rows, hidden]"""
        return F.embedding(token_ids, self.embedding)

    def head_weight(self, weights: Weights) -> Tensor:
        """What turns a hidden state into scores, [vocab, hidden]."""
        if self.config.tie_word_embeddings:
            weights.skip("lm_head.weight")  # some files store the shared matrix twice
            return self.embedding
        return weights.take("lm_head.weight", self.config.vocab_size, self.config.hidden_size)

    def forward(self, inputs: ForwardInputs, pool: Pages, attention: AttentionBackend) -> Tensor:
        """The last hidden states of `inputs.logit_rows`, [logit rows, hidden]; fills the rows' K/V in `pool`."""
        furthest = int(inputs.positions.max())
        for rotary in self._rotaries.values():
            rotary.reach(furthest)
        hidden = self.embed(inputs.token_ids)
        for layer in self.layers:
            hidden = layer(hidden, inputs, pool, attention)
        return self._norm(hidden[inputs.logit_rows])

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> float32 [rows, vocab]"""
        return self._head(hidden).float()

    def products(self) -> dict[str, Linear]:
        """One product of each shape, by name."""
        kinds: dict[str, Linear] = {}
        for layer in self.layers:  # layers of one model may differ: dense ones before mixtures
            kinds = layer.products() | kinds
        return kinds | {"lm_head": self._head}

    def _rotary(self, layer: LayerConfig) -> RotaryEmbedding | None:
        return self._rotaries[layer.rope] if layer.rope else None


def _rotaries(config: ModelConfig, weights: Weights) -> dict[Rope, RotaryEmbedding]:
    """One table for each kind of rotation; layers share them."""
    ropes = {layer.rope: None for layer in config.layers if layer.rope}
    factors = None
    if ROPE_FREQ_FACTORS in weights and ropes:
        # In float32 whatever the model's dtype: at a late position the last bits of a frequency are much of an angle.
        factors = weights.take(ROPE_FREQ_FACTORS, next(iter(ropes)).dim // 2, dtype=torch.float32)
    return {rope: RotaryEmbedding(rope, factors) for rope in ropes}


def _pair_halves(qkv: Linear, config: ModelConfig, rope: Rope) -> None:
    """Reorder the rows of queries and keys from pairs (2i, 2i + 1) to (i, i + dim / 2), as our kernels turn them.
    Both sides of every product are reordered alike, so no score changes."""
    heads = config.num_heads + config.num_kv_heads
    order = torch.arange(heads * config.head_dim).view(heads, config.head_dim)
    order[:, : rope.dim] = order[:, : rope.dim].view(heads, -1, 2).transpose(1, 2).reshape(heads, -1)
    for tensor in (qkv.weight, qkv.bias):
        if tensor is not None:
            tensor[: heads * config.head_dim] = tensor[order.flatten()]


def _skip_derived(weights: Weights, config: ModelConfig) -> None:
    """Tables that old files carry, and that the configuration already tells."""
    for index in range(config.num_layers):
        weights.skip(f"model.layers.{index}.self_attn.rotary_emb.inv_freq")
