"""Tiny models in every file format, for tests: written by transformers, and by the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from springtide.core.store import ModelFiles, ModelFormat
from springtide.engine.attention.base import AttentionBackend
from springtide.engine.attention.registry import choose_attention
from springtide.engine.inputs import ForwardInputs
from springtide.engine.kv import PAGE_SIZE, PagePool
from springtide.engine.models.registry import Model, load_model

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A random Llama in float32; its widths are multiples of 32, so that GGUF's blocks fit."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", ".bias")):  # else all ones and zeros, which hide mistakes
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model


def files_of(path: Path, format: ModelFormat) -> ModelFiles:
    return ModelFiles(name="tiny", source=str(path), path=path, format=format, digest="sha256:" + "0" * 64)


def saved(model: LlamaForCausalLM, folder: Path, **options: Any) -> ModelFiles:
    model.save_pretrained(folder, **options)
    return files_of(folder, "safetensors")


def write_gguf(
    model: LlamaForCausalLM,
    path: Path,
    type: str = "F32",
    *,
    metadata: dict[str, float] | None = None,
    rope_freqs: np.ndarray | None = None,
) -> ModelFiles:
    """As llama.cpp's converter does: its names, q and k permuted, matrices quantised to `type`, vectors float32.

    `metadata` adds or overwrites numbers of the architecture's own keys.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", [f"<{i}>" for i in range(config.vocab_size)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, value in (metadata or {}).items():
        writer.add_float32(f"llama.{key}", value)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            _add_tensor(writer, name, tensor.numpy(), config, gguf.GGMLQuantizationType[type])
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return files_of(path, "gguf")


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, values: np.ndarray, config: LlamaConfig, type: gguf.GGMLQuantizationType
) -> None:
    if ".q_proj." in name:
        values = _permuted(values, config.num_attention_heads)
    if ".k_proj." in name:
        values = _permuted(values, config.num_key_value_heads)
    if values.ndim == 1:
        writer.add_tensor(_gguf_name(name), values)
    else:
        writer.add_tensor(_gguf_name(name), gguf.quants.quantize(values, type), raw_dtype=type)


def _permuted(values: np.ndarray, heads: int) -> np.ndarray:
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{_GGUF_NAMES[stem]}.{kind}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_GGUF_NAMES[part]}.{kind}"


def loaded(files: ModelFiles, dtype: torch.dtype = torch.float32) -> Model:
    return load_model(files, dtype, torch.device("cpu"))[0]


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
