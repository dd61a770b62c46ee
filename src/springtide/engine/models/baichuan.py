"""Baichuan 2 7B: Llama with queries, keys and values in one matrix, and an output matrix whose rows have length 1.
Its 13B sibling places tokens otherwise (ALiBi) and is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from springtide.core.errors import SetupError
from springtide.engine.linear import Linear
from springtide.engine.models.config import ModelConfig
from springtide.engine.models.decoder import Attention, Builder, Decoder, Layer
from springtide.engine.models.family import Family
from springtide.engine.models.reading import RawConfig, read_common
from springtide.engine.weights.base import Weights

_SHORTEST = 1e-12  # rows of tokens that nobody trained may be all zeros


def read_config(raw: RawConfig) -> ModelConfig:
    if "max_position_embeddings" not in raw and "model_max_length" in raw:
        raise SetupError("Baichuan 13B, which places tokens by ALiBi, is not supported; the 7B model is")
    return read_common(raw)


class PackedAttention(Attention):
    def project_qkv(self, build: Builder) -> Linear:
        return build.linear("self_attn.", {"W_pack": 3 * build.config.hidden_size}, build.config.hidden_size)


class BaichuanLayer(Layer):
    def make_attention(self, build: Builder) -> Attention:
        return PackedAttention(build)


class Baichuan(Decoder):
    layer = BaichuanLayer

    def head_weight(self, weights: Weights) -> Tensor:
        weight = super().head_weight(weights)
        lengths = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
        return weight.div_(lengths.clamp_min_(_SHORTEST))


FAMILY = Family(read_config, Baichuan)
