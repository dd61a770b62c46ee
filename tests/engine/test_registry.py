"""Configurations of real models, as their authors published them, are read for what they say; what would be computed
wrongly is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import PreTrainedModel

from springtide.core.errors import SetupError
from springtide.engine.models.config import Experts, LayerConfig, ModelConfig, Rope, RopeScaling
from springtide.engine.models.registry import FAMILIES, open_checkpoint
from tests.engine.checkpoints import files_of, saved, tiny_llama, write_gguf
from tests.engine.families import WINDOW, gemma3, mistral, qwen2, qwen3

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MISTRAL_7B_V0_1 = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_30B_A3B = QWEN3_8B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
}
GEMMA_3_1B_IT = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
GLM_4_9B_0414 = {
    "architectures": ["Glm4ForCausalLM"],
    "attention_bias": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151552,
}
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
MIXTRAL_8X7B = MISTRAL_7B_V0_1 | {
    "architectures": ["MixtralForCausalLM"],
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
BAICHUAN2_7B = {
    "architectures": ["BaichuanForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_max_length": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "vocab_size": 125696,
    "z_loss_weight": 0,
}
BAICHUAN2_13B = {key: value for key, value in BAICHUAN2_7B.items() if key != "max_position_embeddings"} | {
    "hidden_size": 5120,
    "intermediate_size": 13696,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
}


def read(raw: Mapping[str, Any]) -> ModelConfig:
    return FAMILIES[raw["architectures"][0]].read_config(raw)


def shape(
    raw: Mapping[str, Any], layers: list[LayerConfig], *, heads: tuple[int, int, int], **more: Any
) -> ModelConfig:
    """What a configuration should be read as; sizes that need no interpreting are taken from it. `heads`: of queries,
    of keys and values, and their size."""
    num_heads, num_kv_heads, head_dim = heads
    return ModelConfig(
        architecture=raw["architectures"][0],
        layers=tuple(layers),
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=raw["vocab_size"],
        norm_eps=raw["rms_norm_eps"],
        **{"context_length": raw.get("max_position_embeddings")} | more,
    )


_FAR, _NEAR = LayerConfig(Rope(1e6, 256)), LayerConfig(Rope(1e4, 256), window=512)
_YARN_32 = RopeScaling(
    "yarn",
    32.0,
    original_context_length=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    attention_factor=0.1 * math.log(32.0) + 1.0,
    truncate=False,
)
_GPT_OSS = {"rope": Rope(150_000.0, 64, _YARN_32), "experts": Experts(32, 4, 2880)}

EXPECTED: list[tuple[str, dict[str, Any], ModelConfig]] = [
    (
        "Llama 3.1 8B",
        LLAMA_3_1_8B,
        shape(
            LLAMA_3_1_8B,
            [LayerConfig(Rope(500_000.0, 128, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)))] * 32,
            heads=(32, 8, 128),
        ),
    ),
    ("Llama 2 7B", LLAMA_2_7B, shape(LLAMA_2_7B, [LayerConfig(Rope(1e4, 128))] * 32, heads=(32, 32, 128))),
    (
        "Mistral 7B v0.1",
        MISTRAL_7B_V0_1,
        shape(MISTRAL_7B_V0_1, [LayerConfig(Rope(1e4, 128), window=4096)] * 32, heads=(32, 8, 128)),
    ),
    (
        "Qwen2.5 7B",
        QWEN2_5_7B,
        shape(QWEN2_5_7B, [LayerConfig(Rope(1e6, 128))] * 28, heads=(28, 4, 128), attention_bias=True),
    ),
    (
        "Qwen2.5 7B, stretched as its page says",
        QWEN2_5_7B | {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
        shape(
            QWEN2_5_7B,
            [
                LayerConfig(
                    Rope(
                        1e6,
                        128,
                        RopeScaling(
                            "yarn",
                            4.0,
                            original_context_length=32768,
                            attention_factor=0.1 * math.log(4.0) + 1.0,
                        ),
                    )
                )
            ]
            * 28,
            heads=(28, 4, 128),
            attention_bias=True,
            context_length=131072,
        ),
    ),
    ("Qwen3 8B", QWEN3_8B, shape(QWEN3_8B, [LayerConfig(Rope(1e6, 128))] * 36, heads=(32, 8, 128))),
    (
        "Qwen3 30B A3B",
        QWEN3_30B_A3B,
        shape(
            QWEN3_30B_A3B,
            [LayerConfig(Rope(1e6, 128), experts=Experts(128, 8, 768))] * 48,
            heads=(32, 4, 128),
        ),
    ),
    (
        "Gemma 3 1B",
        GEMMA_3_1B_IT,
        shape(
            GEMMA_3_1B_IT,
            [_FAR if index in (5, 11, 17, 23) else _NEAR for index in range(26)],
            heads=(4, 1, 256),
            activation="gelu_tanh",
            attention_scale=1 / 16,
            tie_word_embeddings=True,
        ),
    ),
    (
        "GLM-4 9B 0414",
        GLM_4_9B_0414,
        shape(
            GLM_4_9B_0414,
            [LayerConfig(Rope(1e4, 64, interleaved=True))] * 40,
            heads=(32, 2, 128),
            attention_bias=True,
        ),
    ),
    (
        "gpt-oss 20B",
        GPT_OSS_20B,
        shape(
            GPT_OSS_20B,
            [LayerConfig(**_GPT_OSS, window=None if index % 2 else 128) for index in range(24)],
            heads=(64, 8, 64),
            attention_bias=True,
            attention_output_bias=True,
        ),
    ),
    (
        "Mixtral 8x7B",
        MIXTRAL_8X7B,
        shape(MIXTRAL_8X7B, [LayerConfig(Rope(1e6, 128), experts=Experts(8, 2, 14336))] * 32, heads=(32, 8, 128)),
    ),
    ("Baichuan 2 7B", BAICHUAN2_7B, shape(BAICHUAN2_7B, [LayerConfig(Rope(1e4, 128))] * 32, heads=(32, 32, 128))),
]


@pytest.mark.parametrize(("raw", "expected"), [pytest.param(raw, config, id=name) for name, raw, config in EXPECTED])
def test_a_published_configuration_is_read_for_what_it_says(raw: dict[str, Any], expected: ModelConfig) -> None:
    assert read(raw) == expected


def test_gpt_oss_needs_no_layer_types() -> None:
    """Its first files named none."""
    assert read({key: value for key, value in GPT_OSS_20B.items() if key != "layer_types"}) == read(GPT_OSS_20B)


def test_a_window_of_the_upper_layers_alone() -> None:
    config = read(QWEN2_5_7B | {"use_sliding_window": True, "max_window_layers": 20, "sliding_window": 4096})
    assert [layer.window for layer in config.layers] == [None] * 20 + [4096] * 8


def test_gemma_27b_scales_by_its_heads_share_of_the_hidden_size_where_a_file_does_not_say(tmp_path: Path) -> None:
    sizes = {"hidden_size": 5376, "num_attention_heads": 32, "head_dim": 128, "query_pre_attn_scalar": None}
    assert read(GEMMA_3_1B_IT | sizes | {"num_hidden_layers": 62}).attention_scale == pytest.approx(168**-0.5)
    assert read(GEMMA_3_1B_IT | sizes | {"num_hidden_layers": 34}).attention_scale == pytest.approx(128**-0.5)


# --- refusals ---


def refusal(folder: Path, raw: Mapping[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(SetupError) as caught:
        open_checkpoint(files_of(folder, "safetensors"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("raw", "changes", "expected"),
    [
        (LLAMA_2_7B, {"architectures": ["MambaForCausalLM"]}, "the architecture MambaForCausalLM is not supported"),
        (LLAMA_2_7B, {"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration is not"),
        (LLAMA_2_7B, {"architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM is not supported"),
        (GEMMA_3_1B_IT, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported"),
        (GEMMA_3_1B_IT, {"final_logit_softcapping": 30.0}, "final_logit_softcapping is not supported"),
        (GEMMA_3_1B_IT, {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        (BAICHUAN2_13B, {}, "ALiBi"),
        (GPT_OSS_20B, {"swiglu_limit": 5.0}, "swiglu_limit is 5.0"),
        (QWEN3_8B, {"layer_types": ["linear_attention"] * 36}, "'linear_attention'"),
        (QWEN3_8B, {"hidden_act": "relu"}, "activation 'relu' is not supported"),
        (LLAMA_2_7B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' is not supported"),
        (LLAMA_2_7B, {"architectures": "LlamaForCausalLM"}, "the architecture none is not supported"),
        (LLAMA_2_7B, {"architectures": {"0": "LlamaForCausalLM"}}, "the architecture none is not supported"),
        (LLAMA_2_7B, {"architectures": 5}, "the architecture none is not supported"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_with_what_is_supported(
    tmp_path: Path, raw: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    message = refusal(tmp_path, raw | changes)
    assert expected in message
    assert "supported: " in message


@pytest.mark.parametrize("name", ["MambaForCausalLM", "Gemma3ForConditionalGeneration"])
def test_a_refusal_lists_every_architecture(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path, LLAMA_2_7B | {"architectures": [name]})
    assert all(known in message for known in FAMILIES)


@pytest.mark.parametrize(
    ("raw", "changes", "expected"),
    [
        (QWEN3_8B, {"layer_types": ["full_attention"] * 3}, "36 layers, but layer_types names 3"),
        (MISTRAL_7B_V0_1, {"sliding_window": 0}, "a window of 0 tokens sees nothing"),
        (GLM_4_9B_0414, {"partial_rotary_factor": 1.5}, "192 of 128 dimensions can't be rotated"),
        (MIXTRAL_8X7B, {"num_experts_per_tok": 9}, "9 of 8 experts can't be chosen"),
        (MIXTRAL_8X7B, {"num_local_experts": None}, "not a model configuration"),
        (LLAMA_2_7B, {"rope_scaling": {"type": "linear", "factor": 0.0}}, "can't be stretched by"),
        (
            LLAMA_2_7B,
            {"rope_scaling": LLAMA_3_1_8B["rope_scaling"] | {"high_freq_factor": 1.0}},
            "can't be stretched by",
        ),
        (LLAMA_2_7B, {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1.0}, "can't be stretched by"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(
    tmp_path: Path, raw: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    assert expected in refusal(tmp_path, raw | changes)


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(SetupError, match=r"LoRA adapter.*supported: .*LlamaForCausalLM"):
        open_checkpoint(files_of(tmp_path, "safetensors"))


@pytest.mark.parametrize("architecture", ["mamba", "clip", "gemma2"])
def test_other_gguf_architectures_are_refused_by_name(tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor("a.weight", np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SetupError) as caught:
        open_checkpoint(files_of(path, "gguf"))
    assert f"'{architecture}', which is not supported" in str(caught.value)
    assert "supported in GGUF: gemma3, glm4, gpt-oss, llama, qwen2, qwen3, qwen3moe" in str(caught.value)


@pytest.mark.parametrize("entry", ["attn_logit_softcapping", "final_logit_softcapping"])
@pytest.mark.parametrize("make", [gemma3, tiny_llama, qwen3])
def test_softcapping_in_gguf_is_refused_too(tmp_path: Path, make: Callable[[], PreTrainedModel], entry: str) -> None:
    files = write_gguf(make(), tmp_path / "tiny.gguf", metadata={entry: 30.0})
    with pytest.raises(SetupError, match=rf"{entry} 30\.0 is not supported"):
        open_checkpoint(files)


@pytest.mark.parametrize("make", [mistral, lambda: qwen2(use_sliding_window=True, sliding_window=WINDOW)])
def test_a_window_in_a_gguf_whose_family_knows_none_is_refused(
    tmp_path: Path, make: Callable[[], PreTrainedModel]
) -> None:
    """GGUF calls a Mistral llama."""
    model = make()
    with pytest.raises(SetupError, match=f"asks for a window of {WINDOW} tokens, which is not supported in GGUF"):
        open_checkpoint(write_gguf(model, tmp_path / "tiny.gguf"))
    everything = write_gguf(model, tmp_path / "wide.gguf", metadata={"attention.sliding_window": 256})
    assert open_checkpoint(everything).config.layers[0].window is None


def test_a_llama_without_experts_is_no_mixtral(tmp_path: Path) -> None:
    assert open_checkpoint(write_gguf(tiny_llama(), tmp_path / "a.gguf")).config.architecture == "LlamaForCausalLM"


def test_what_weights_take_is_known_before_they_are_read(tmp_path: Path) -> None:
    import torch

    model = tiny_llama()
    checkpoint = open_checkpoint(saved(model, tmp_path))
    assert checkpoint.weight_bytes(torch.bfloat16) == 2 * sum(each.numel() for each in model.parameters())
