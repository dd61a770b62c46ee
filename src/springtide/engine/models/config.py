"""The shape of a language model: what a checkpoint says about itself. Knows nothing of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_MOST_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    "linear" divides every frequency by `factor`. "llama3" divides the long waves by `factor`, keeps the short
    ones, and blends between `low_freq_factor` and `high_freq_factor` waves per original context.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that decides a model's shapes and arithmetic, whatever file format it came from.

    `architecture` is the Hugging Face class name, and the registry's key. `context_length` is in tokens.

    Raises:
        ValueError: sizes that no model can have.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        sizes = (self.hidden_size, self.intermediate_size, self.head_dim, self.vocab_size, self.context_length)
        if min(sizes) < 1 or not 1 <= self.num_layers <= _MOST_LAYERS:
            raise ValueError("a size is not positive, or out of all reason")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads or not self.num_heads:
            raise ValueError(f"{self.num_heads} heads can't share {self.num_kv_heads} kv heads")
        if self.head_dim % 2 or not self.rope_theta > 0:
            raise ValueError(f"heads of {self.head_dim} can't be rotated with theta {self.rope_theta}")
