"""The Llama family: RMSNorm before each half of a layer, rotary positions, grouped heads, gated feed-forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from springtide.engine.attention.base import AttentionBackend, Pages
from springtide.engine.inputs import ForwardInputs
from springtide.engine.layers import RMSNorm, RotaryEmbedding, silu_and_mul
from springtide.engine.linear import Linear
from springtide.engine.models.config import ModelConfig
from springtide.engine.weights.base import ROPE_FREQ_FACTORS, Weights


class Llama:
    """A decoder: token ids in, hidden states of the wanted rows out; `logits` turns those into scores.

    Raises:
        SetupError: tensors are missing, left over, or of another shape than `config` says.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self._embedding = weights.take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self._rotary = RotaryEmbedding(config, _freq_factors(config, weights))
        self._layers = [_Layer(config, weights, self._rotary, layer) for layer in range(config.num_layers)]
        self._norm = RMSNorm(weights.take("model.norm.weight", config.hidden_size), config.norm_eps)
        self._lm_head = Linear(self._output_weight(weights))
        weights.finish()

    def forward(self, inputs: ForwardInputs, pool: Pages, attention: AttentionBackend) -> Tensor:
        """The last hidden states of `inputs.logit_rows`, [logit rows, hidden]; fills the rows' K/V in `pool`."""
        self._rotary.reach(int(inputs.positions.max()))
        hidden = F.embedding(inputs.token_ids, self._embedding)
        for layer in self._layers:
            hidden = layer(hidden, inputs, pool, attention)
        return self._norm(hidden[inputs.logit_rows])

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> float32 [rows, vocab]"""
        return self._lm_head(hidden).float()

    def products(self) -> dict[str, Linear]:
        """One product of each shape, by name."""
        return self._layers[0].products() | {"lm_head": self._lm_head}

    def _output_weight(self, weights: Weights) -> Tensor:
        if self.config.tie_word_embeddings:
            weights.skip("lm_head.weight")  # some files store the shared matrix twice
            return self._embedding
        return weights.take("lm_head.weight", self.config.vocab_size, self.config.hidden_size)


class _Layer:
    def __init__(self, config: ModelConfig, weights: Weights, rotary: RotaryEmbedding, layer: int) -> None:
        prefix = f"model.layers.{layer}."
        hidden = config.hidden_size
        weights.skip(f"{prefix}self_attn.rotary_emb.inv_freq")  # old files carry this table
        self._input_norm = RMSNorm(weights.take(f"{prefix}input_layernorm.weight", hidden), config.norm_eps)
        self._attention = _Attention(config, weights, rotary, layer, f"{prefix}self_attn.")
        self._mlp_norm = RMSNorm(weights.take(f"{prefix}post_attention_layernorm.weight", hidden), config.norm_eps)
        self._mlp = _MLP(config, weights, f"{prefix}mlp.")

    def __call__(self, x: Tensor, inputs: ForwardInputs, pool: Pages, attention: AttentionBackend) -> Tensor:
        x = x + self._attention(self._input_norm(x), inputs, pool, attention)
        return x + self._mlp(self._mlp_norm(x))

    def products(self) -> dict[str, Linear]:
        attention, mlp = self._attention, self._mlp
        return {"qkv": attention.qkv, "o_proj": attention.output, "gate_up": mlp.gate_up, "down_proj": mlp.down}


class _Attention:
    def __init__(self, config: ModelConfig, weights: Weights, rotary: RotaryEmbedding, layer: int, prefix: str) -> None:
        self._layer = layer
        self._rotary = rotary
        self._scale = config.head_dim**-0.5
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        sizes = {"q_proj": query_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv = _fused(weights, prefix, sizes, config.hidden_size, bias=config.attention_bias)
        self.output = _fused(
            weights, prefix, {"o_proj": config.hidden_size}, query_size, bias=config.attention_output_bias
        )

    def __call__(self, x: Tensor, inputs: ForwardInputs, pool: Pages, attention: AttentionBackend) -> Tensor:
        q, k, v = self._rotary.split(self.qkv(x), inputs.positions)
        attended = attention.attend(self._layer, q, k, v, pool, inputs, self._scale)
        return self.output(attended.view(x.shape[0], -1))


class _MLP:
    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = _fused(weights, prefix, {"gate_proj": inner, "up_proj": inner}, hidden, bias=config.mlp_bias)
        self.down = _fused(weights, prefix, {"down_proj": hidden}, inner, bias=config.mlp_bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(silu_and_mul(self.gate_up(x)))


def _fused(weights: Weights, prefix: str, sizes: dict[str, int], in_features: int, *, bias: bool) -> Linear:
    """Projections of the same input as one product; `sizes` are their outputs."""
    weight = weights.stack([f"{prefix}{name}.weight" for name in sizes], [(n, in_features) for n in sizes.values()])
    if not bias:
        return Linear(weight)
    return Linear(weight, weights.stack([f"{prefix}{name}.bias" for name in sizes], [(n,) for n in sizes.values()]))


def _freq_factors(config: ModelConfig, weights: Weights) -> Tensor | None:
    if ROPE_FREQ_FACTORS not in weights:
        return None
    # In float32 whatever the model's dtype: at a late position the last bits of a frequency are much of an angle.
    return weights.take(ROPE_FREQ_FACTORS, config.head_dim // 2, dtype=torch.float32)
