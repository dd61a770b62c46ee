"""The shape of a language model: what a checkpoint says about itself. Knows nothing of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head (GQA)."""
        return self.num_heads // self.num_kv_heads
