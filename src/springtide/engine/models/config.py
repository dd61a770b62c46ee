"""The shape of a language model: what a checkpoint says about itself. Knows nothing of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

MOST_LAYERS = 4096

Activation: TypeAlias = Literal["silu", "gelu_tanh", "clamped_swiglu"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    "linear" divides every frequency by `factor`. "llama3" divides the long waves by `factor`, keeps the short
    ones, and blends between `low_freq_factor` and `high_freq_factor` waves per original context. "yarn" (Peng et
    al. 2023) blends between `beta_slow` and `beta_fast` turns per original context, and multiplies cosine and
    sine by `attention_factor`; `truncate` rounds the ends of the blend to whole dimensions.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions (Su et al. 2021). `dim` is how much of each head turns, its first part. `interleaved` says
    how the checkpoint pairs them: (2i, 2i + 1), else (i, i + dim / 2)."""

    theta: float
    dim: int
    scaling: RopeScaling | None = None
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture in place of the feed-forward: `per_token` of `count` experts, each `intermediate_size` wide.

    Each counts by its share of the softmax over all experts' scores; `renormalise`: over those of the chosen ones.
    """

    count: int
    per_token: int
    intermediate_size: int
    renormalise: bool = True


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer. `window`: positions that a row sees, None for all. `rope`: None for a
    layer without positions. `experts`: None for a dense feed-forward."""

    rope: Rope | None
    window: int | None = None
    experts: Experts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that decides a model's shapes and arithmetic, whatever file format it came from.

    `architecture` is the Hugging Face class name, and the registry's key. `context_length` is in tokens.
    `attention_scale` None means 1 / sqrt(head_dim).

    Raises:
        ValueError: sizes that no model can have.
    """

    architecture: str
    layers: tuple[LayerConfig, ...]
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float = 1e-5
    activation: Activation = "silu"
    attention_scale: float | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def __post_init__(self) -> None:
        sizes = (self.hidden_size, self.intermediate_size, self.head_dim, self.vocab_size, self.context_length)
        if min(sizes) < 1 or not 1 <= self.num_layers <= MOST_LAYERS:
            raise ValueError("a size is not positive, or out of all reason")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads or not self.num_heads:
            raise ValueError(f"{self.num_heads} heads can't share {self.num_kv_heads} kv heads")
        for layer in self.layers:
            self._check_layer(layer)

    def _check_layer(self, layer: LayerConfig) -> None:
        rope, experts = layer.rope, layer.experts
        if rope and not (rope.theta > 0 and rope.dim > 0 and rope.dim % 2 == 0 and rope.dim <= self.head_dim):
            raise ValueError(f"{rope.dim} of {self.head_dim} dimensions can't be rotated with theta {rope.theta}")
        if rope and rope.scaling and not _is_possible(rope.scaling, rope.theta):
            raise ValueError(f"positions can't be stretched by {rope.scaling} with theta {rope.theta}")
        if layer.window is not None and layer.window < 1:
            raise ValueError(f"a window of {layer.window} tokens sees nothing")
        if experts and not (1 <= experts.per_token <= experts.count and experts.intermediate_size > 0):
            raise ValueError(f"{experts.per_token} of {experts.count} experts can't be chosen")


def _is_possible(scaling: RopeScaling, theta: float) -> bool:
    """Whether no division by zero lies in wait, and every frequency is one."""
    if scaling.kind == "llama3" and not scaling.low_freq_factor < scaling.high_freq_factor:
        return False
    if scaling.kind == "yarn" and not (theta > 1 and scaling.beta_fast > 0 and scaling.beta_slow > 0):
        return False
    return 0 < scaling.factor < math.inf and scaling.original_context_length > 0
