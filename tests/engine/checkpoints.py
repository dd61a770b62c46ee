"""Tiny models in every file format, for tests: written by transformers, and by the gguf package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from springtide.core.store import ModelFiles, ModelFormat
from springtide.engine.attention.base import AttentionBackend
from springtide.engine.attention.registry import choose_attention
from springtide.engine.inputs import ForwardInputs
from springtide.engine.kv import PAGE_SIZE, PagePool
from springtide.engine.models.registry import Model, open_checkpoint
from tests.engine.families import llama

# What llama.cpp calls a model_type of transformers.
_GGUF_ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt-oss",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
}
_GGUF_NUMBERS = {  # of its metadata, where a configuration has them
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A random Llama in float32 of two layers, with heads of 16."""
    return llama(**{"num_hidden_layers": 2, "head_dim": 16} | changes)


def files_of(path: Path, format: ModelFormat) -> ModelFiles:
    return ModelFiles(name="tiny", source=str(path), path=path, format=format, digest="sha256:" + "0" * 64)


def saved(model: PreTrainedModel, folder: Path, **options: Any) -> ModelFiles:
    model.save_pretrained(folder, **options)
    return files_of(folder, "safetensors")


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    type: str = "F32",
    *,
    metadata: dict[str, float] | None = None,
    rope_freqs: np.ndarray | None = None,
) -> ModelFiles:
    """As llama.cpp's converter does: its names and its order of rows, matrices quantised to `type`, vectors and
    routers float32.

    `metadata` adds or overwrites numbers of the architecture's own keys.
    """
    config = model.config
    architecture = _GGUF_ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_array("tokenizer.ggml.tokens", [f"<{i}>" for i in range(config.vocab_size)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * config.vocab_size)
    for key, field in _GGUF_NUMBERS.items():
        if getattr(config, field, None) is not None:
            writer.add_uint32(f"{architecture}.{key}", getattr(config, field))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_rope(writer, config)
    for key, value in (metadata or {}).items():
        writer.add_float32(f"{architecture}.{key}", value)
    for name, values in _gguf_tensors(model, architecture):
        kind = gguf.GGMLQuantizationType["F32" if values.ndim == 1 or "bias" in name or "_inp" in name else type]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return files_of(path, "gguf")


def _add_rope(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    rope = config.rope_parameters
    if "full_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(config.head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])


def _gguf_tensors(model: PreTrainedModel, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper().replace("-", "_")), 99)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        for part, values in _parts(name, tensor, model.config):
            if architecture == "gemma3" and name.endswith("norm.weight"):
                values = values + 1
            if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
                values = _permuted(values, model.config.head_dim)
            found = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert found is not None, part
            yield found if found.endswith((".weight", ".bias")) else f"{found}.weight", values.numpy()


def _parts(name: str, tensor: Tensor, config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """A tensor as GGUF has it: experts with outputs before inputs, gate and up of experts apart."""
    stem, _, part = name.rpartition(".experts.")
    if not stem:
        yield name, tensor
        return
    kind = "bias" if part.endswith("_bias") else "weight"
    interleaved = config.model_type == "gpt_oss"
    if interleaved and kind == "weight":
        tensor = tensor.transpose(1, 2).contiguous()
    if "gate_up" in part:
        halves = (tensor[:, ::2], tensor[:, 1::2]) if interleaved else tensor.chunk(2, dim=1)
        for half, values in zip(("gate", "up"), halves, strict=True):
            yield f"{stem}.experts.{half}_proj.{kind}", values.contiguous()
    else:
        yield f"{stem}.experts.down_proj.{kind}", tensor


def _permuted(values: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from (i, i + half) to (2i, 2i + 1)."""
    return values.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(values.shape)


def loaded(files: ModelFiles, dtype: torch.dtype = torch.float32) -> Model:
    return open_checkpoint(files).load(dtype, torch.device("cpu"))


def pages_for(model: Model, num_seqs: int, num_tokens: int, dtype: torch.dtype) -> tuple[PagePool, torch.Tensor]:
    """A pool, and a page table that hands out its pages in disorder, for sequences of up to `num_tokens`."""
    config = model.config
    pages = -(-num_tokens // PAGE_SIZE)
    pool = PagePool(num_seqs * pages, config.num_layers, config.num_kv_heads, config.head_dim, dtype)
    order = torch.randperm(len(pool.k), generator=torch.Generator().manual_seed(1)).int()
    return pool, order.view(num_seqs, config.num_layers, config.num_kv_heads, pages)


@torch.inference_mode()
def all_logits(
    model: Model,
    prompt: list[int],
    *,
    chunk: int = 512,
    attention: AttentionBackend | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Logits at every position of a prompt that runs in chunks, float32 [len(prompt), vocab]."""
    backend = attention or choose_attention("auto", model.config, dtype)
    pool, page_table = pages_for(model, 1, len(prompt), dtype)
    logits = []
    for start in range(0, len(prompt), chunk):
        tokens = prompt[start : start + chunk]
        inputs = ForwardInputs(
            token_ids=torch.tensor(tokens),
            positions=torch.arange(start, start + len(tokens)),
            row_seq=torch.zeros(len(tokens), dtype=torch.int32),
            page_table=page_table,
            logit_rows=torch.arange(len(tokens)),
        )
        logits.append(model.logits(model.forward(inputs, pool, backend)))
    return torch.cat(logits)
