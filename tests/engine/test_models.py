"""Models from every kind of file they can come in: shards, GGUF of all types, Baichuan's own layout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from springtide.core.store import ModelFiles
from springtide.engine.attention.registry import choose_attention
from springtide.engine.inputs import ForwardInputs
from springtide.engine.models.registry import open_checkpoint
from springtide.engine.weights.base import ROPE_FREQ_FACTORS, Weights
from tests.engine import families
from tests.engine.checkpoints import all_logits, files_of, loaded, pages_for, saved, tiny_llama, write_gguf
from tests.engine.families import VOCAB, YARN, rope
from tests.engine.harness import random_prompt

PROMPT = random_prompt(3, 70, below=VOCAB)

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def gemma3() -> PreTrainedModel:
    """In GGUF every sixth layer of it sees all, and scores are scaled by the head's size."""
    kinds = [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]
    stretched = {"full_attention": rope("linear", 1e6, factor=8.0), "sliding_attention": rope()}
    return families.gemma3(num_hidden_layers=7, layer_types=kinds, query_pre_attn_scalar=24, rope_parameters=stretched)


IN_GGUF: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": families.llama,
    "llama: tied embeddings": lambda: families.llama(tie_word_embeddings=True),
    "llama: biases": lambda: families.llama(attention_bias=True, mlp_bias=True),
    "mistral": lambda: families.mistral(sliding_window=None),
    "mixtral": families.mixtral,
    "qwen2": families.qwen2,
    "qwen2: yarn": lambda: families.qwen2(rope_parameters=YARN),
    "qwen3": families.qwen3,
    "qwen3-moe": families.qwen3_moe,
    "gemma3": gemma3,
    "glm4": families.glm4,
    "gpt-oss": families.gpt_oss,
}


@torch.inference_mode()
def theirs(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.tensor([PROMPT])).logits[0]


def worst_error(model: PreTrainedModel, files: ModelFiles, **options: Any) -> float:
    return (all_logits(loaded(files), PROMPT, **options) - theirs(model)).abs().max().item()


def test_shards_equal_one_file(tmp_path: Path) -> None:
    model = tiny_llama()
    files = saved(model, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert worst_error(model, files) < 1e-4


# --- GGUF ---


@pytest.mark.parametrize("name", IN_GGUF)
def test_gguf_in_float32_equals_transformers(tmp_path: Path, name: str) -> None:
    model = IN_GGUF[name]()
    assert worst_error(model, write_gguf(model, tmp_path / "tiny.gguf")) < 1e-4


@pytest.mark.parametrize("name", IN_GGUF)
def test_quantised_gguf_equals_transformers_with_the_rounded_weights(tmp_path: Path, name: str) -> None:
    model = IN_GGUF[name]()
    files = write_gguf(model, tmp_path / "tiny.gguf", "Q8_0")
    _round_weights(model, "Q8_0")
    assert worst_error(model, files) < 1e-3


@pytest.mark.parametrize("type", ["F16", "BF16", "Q5_0", "Q4_1", "Q4_0"])
def test_every_type_of_gguf_equals_transformers_with_the_rounded_weights(tmp_path: Path, type: str) -> None:
    model = tiny_llama()
    files = write_gguf(model, tmp_path / "tiny.gguf", type)
    _round_weights(model, type)
    assert worst_error(model, files) < 1e-3


def test_frequency_factors_of_a_gguf_file_stretch_the_rotation(tmp_path: Path) -> None:
    """Llama 3 in GGUF keeps its scaling as a tensor. A constant factor is linear scaling."""
    model = tiny_llama(rope_parameters=rope("linear", factor=4.0))
    plain = tiny_llama()
    factors = np.full(model.config.head_dim // 2, 4.0)
    assert worst_error(model, write_gguf(plain, tmp_path / "tiny.gguf", rope_freqs=factors)) < 1e-4


def test_frequency_factors_are_kept_whole_in_bfloat16(tmp_path: Path) -> None:
    factors = np.linspace(1.0, 8.1, 8)
    files = write_gguf(tiny_llama(), tmp_path / "tiny.gguf", rope_freqs=factors)
    given = Weights(open_checkpoint(files).reader, torch.bfloat16, torch.device("cpu"))
    taken = given.take(ROPE_FREQ_FACTORS, 8, dtype=torch.float32)
    assert np.array_equal(taken.numpy(), factors.astype(np.float32))


# --- Baichuan ---


def test_baichuan_is_llama_with_packed_projections_and_a_normalised_head(tmp_path: Path) -> None:
    model = families.llama(num_key_value_heads=4, head_dim=16)
    files = as_baichuan(model, tmp_path)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.nn.functional.normalize(model.lm_head.weight))
    assert worst_error(model, files) < 1e-4
    ours = loaded(files)
    assert torch.equal(all_logits(ours, PROMPT, chunk=3), all_logits(ours, PROMPT))


def test_a_token_that_baichuan_never_learned_harms_no_other(tmp_path: Path) -> None:
    model = families.llama(num_key_value_heads=4, head_dim=16)
    with torch.no_grad():
        model.lm_head.weight[7] = 0.0
    logits = all_logits(loaded(as_baichuan(model, tmp_path)), PROMPT)
    assert logits.isfinite().all() and not logits[:, 7].any()


def as_baichuan(model: LlamaForCausalLM, folder: Path) -> ModelFiles:
    """A Llama in the layout of Baichuan 2 7B."""
    tensors = dict(model.state_dict())
    for layer in range(model.config.num_hidden_layers):
        within = f"model.layers.{layer}.self_attn."
        parts = [tensors.pop(f"{within}{part}_proj.weight") for part in "qkv"]
        tensors[f"{within}W_pack.weight"] = torch.cat(parts)
        tensors[f"{within}rotary_emb.inv_freq"] = torch.zeros(8)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    raw = {
        "architectures": ["BaichuanForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": model.config.hidden_size,
        "intermediate_size": model.config.intermediate_size,
        "max_position_embeddings": 256,
        "model_max_length": 256,
        "num_attention_heads": model.config.num_attention_heads,
        "num_hidden_layers": model.config.num_hidden_layers,
        "rms_norm_eps": model.config.rms_norm_eps,
        "tie_word_embeddings": False,
        "vocab_size": model.config.vocab_size,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    return files_of(folder, "safetensors")


# --- MXFP4 ---


def test_gpt_oss_with_experts_in_four_bits_equals_transformers_with_the_same_values(tmp_path: Path) -> None:
    model = families.gpt_oss()
    files = saved(model, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    weights = model.state_dict()
    generator = torch.Generator().manual_seed(4)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        codes = torch.randint(16, (experts, outputs, inputs // 32, 32), generator=generator)
        scales = torch.randint(122, 126, (experts, outputs, inputs // 32), generator=generator)
        values = FP4[codes] * 2.0 ** (scales[..., None] - 127)
        with torch.no_grad():
            weights[name].copy_(values.flatten(2).transpose(1, 2))
        tensors[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{name}_scales"] = scales.to(torch.uint8)
    safetensors.torch.save_file(tensors, path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "mxfp4"}}))
    assert worst_error(model, files) < 1e-4


# --- broken numbers ---


@pytest.mark.parametrize("make", [tiny_llama, families.qwen3_moe, families.gpt_oss])
def test_a_broken_number_stays_in_its_sequence(tmp_path: Path, make: Callable[[], PreTrainedModel]) -> None:
    """A NaN in an embedding must reach the logits of its own sequence, where the sampler reports it, and no other."""
    broken = make()
    with torch.no_grad():
        broken.get_input_embeddings().weight[5] = math.nan
    model = loaded(saved(broken, tmp_path))
    pool, page_table = pages_for(model, 2, 3, torch.float32)
    inputs = ForwardInputs(
        token_ids=torch.tensor([1, 2, 3, 4, 5]),
        positions=torch.tensor([0, 1, 2, 0, 1]),
        row_seq=torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32),
        page_table=page_table,
        logit_rows=torch.tensor([2, 4]),
    )
    with torch.inference_mode():
        logits = model.logits(model.forward(inputs, pool, choose_attention("auto", model.config, torch.float32)))
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


def _round_weights(model: PreTrainedModel, type: str) -> None:
    """What is left of the matrices after a round trip through the block format. Blocks lie within rows, so the
    order of rows does not matter; gpt-oss alone has its experts the other way round."""
    kind = gguf.GGMLQuantizationType[type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith(("_bias", "mlp.gate.weight", "mlp.router.weight")):
                continue
            turned = model.config.model_type == "gpt_oss" and parameter.ndim == 3
            values = parameter.transpose(1, 2) if turned else parameter
            packed = gguf.quants.quantize(values.contiguous().numpy(), kind)
            rounded = torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())
            parameter.copy_(rounded.transpose(1, 2) if turned else rounded)
