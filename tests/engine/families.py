"""A tiny random model of every family, as transformers computes it. The specification of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

Make: TypeAlias = Callable[[], PreTrainedModel]

VOCAB = 160
WINDOW = 20  # shorter than the tests' prompts, and no whole pages

# Widths are multiples of 32, so that GGUF's blocks fit, but for those of heads: no multiple of any vector's.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny(model: type[PreTrainedModel], config: type[PretrainedConfig], *, std: float = 0.3, **changes: Any) -> Any:
    """A random model in float32. Norms, biases and sinks are far from the ones and zeros that would hide mistakes."""
    torch.manual_seed(0)
    made = model(config(**_SIZES | changes)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            plain = parameter.ndim > 1 and not name.endswith("_bias")
            parameter.normal_(0.0 if plain else 0.5, std if plain else 0.3)
    return made


def rope(kind: str = "default", theta: float = 10_000.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=2.0)


def llama(**changes: Any) -> LlamaForCausalLM:
    return tiny(LlamaForCausalLM, LlamaConfig, **changes)


def mistral(**changes: Any) -> MistralForCausalLM:
    return tiny(MistralForCausalLM, MistralConfig, **{"sliding_window": WINDOW} | changes)


def qwen2(**changes: Any) -> Qwen2ForCausalLM:
    return tiny(Qwen2ForCausalLM, Qwen2Config, **changes)


def qwen3(**changes: Any) -> Qwen3ForCausalLM:
    return tiny(Qwen3ForCausalLM, Qwen3Config, **changes)


def gemma3(**changes: Any) -> Gemma3ForCausalLM:
    kinds = {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 40,
        "rope_parameters": {"full_attention": rope(theta=1e6), "sliding_attention": rope()},
        "tie_word_embeddings": True,
    }
    return tiny(Gemma3ForCausalLM, Gemma3TextConfig, **kinds | changes)


def glm(**changes: Any) -> GlmForCausalLM:
    return tiny(GlmForCausalLM, GlmConfig, **_HALF | changes)


def glm4(**changes: Any) -> Glm4ForCausalLM:
    return tiny(Glm4ForCausalLM, Glm4Config, **_HALF | changes)


_HALF: dict[str, Any] = {
    "rope_parameters": rope(partial_rotary_factor=0.5),
    "attention_bias": True,
    "rms_norm_eps": 1e-5,
}


def gpt_oss(**changes: Any) -> GptOssForCausalLM:
    """Its experts' products are large enough to be clamped."""
    own = {
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "sliding_window": WINDOW,
        "rope_parameters": rope(
            "yarn", 150_000.0, factor=8.0, original_max_position_embeddings=32, beta_fast=3.0, truncate=False
        ),
    }
    made = tiny(GptOssForCausalLM, GptOssConfig, **own | changes)
    with torch.no_grad():
        for layer in made.model.layers:
            layer.mlp.experts.gate_up_proj *= 4.0
    return made


def mixtral(**changes: Any) -> MixtralForCausalLM:
    return tiny(MixtralForCausalLM, MixtralConfig, **{"num_local_experts": 4} | changes)


def qwen3_moe(**changes: Any) -> Qwen3MoeForCausalLM:
    own = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return tiny(Qwen3MoeForCausalLM, Qwen3MoeConfig, **own | changes)


# One of each family: for what must hold of all of them, and costs too much to be tried on every variant.
FAMILIES: dict[str, Make] = {
    "llama": lambda: llama(rope_parameters=LLAMA3),
    "mistral": mistral,
    "qwen2": lambda: qwen2(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": qwen3,
    "gemma3": gemma3,
    "glm": glm,
    "glm4": glm4,
    "gpt-oss": gpt_oss,
    "mixtral": mixtral,
    "qwen3-moe": lambda: qwen3_moe(mlp_only_layers=[1]),
}

VARIANTS: dict[str, Make] = {
    "llama: plain": llama,
    "llama: tied embeddings": lambda: llama(tie_word_embeddings=True),
    "llama: a kv head for each head": lambda: llama(num_key_value_heads=4),
    "llama: one kv head": lambda: llama(num_key_value_heads=1),
    "llama: heads as wide as hidden / heads": lambda: llama(head_dim=None),
    "llama: biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama: theta": lambda: llama(rope_parameters=rope(theta=500_000.0)),
    "llama: linear scaling": lambda: llama(rope_parameters=rope("linear", factor=4.0)),
    "mistral: no window": lambda: mistral(sliding_window=None),
    "qwen2: no window": qwen2,
    "qwen2: yarn": lambda: qwen2(rope_parameters=YARN),
    "qwen3: window": lambda: qwen3(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3: yarn": lambda: qwen3(rope_parameters=YARN, attention_bias=True),
    "gemma3: its own head": lambda: gemma3(tie_word_embeddings=False, attention_bias=True),
    "gemma3: far layers stretched": lambda: gemma3(
        rope_parameters={"full_attention": rope("linear", 1e6, factor=8.0), "sliding_attention": rope()}
    ),
    "glm4: no biases": lambda: glm4(attention_bias=False),
    "gpt-oss: no window": lambda: gpt_oss(layer_types=["full_attention"] * 3),
    "mixtral: window": lambda: mixtral(sliding_window=WINDOW),
    "qwen3-moe: every other layer": lambda: qwen3_moe(decoder_sparse_step=2),
    "qwen3-moe: shares of all experts": lambda: qwen3_moe(norm_topk_prob=False),
}
