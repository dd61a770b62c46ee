"""A GGUF file as Hugging Face-style tensors and a ModelConfig; memory-mapped, dequantised on the way out.

The head is read by `springtide.text.gguf_metadata`; the block formats are those of the `gguf` package.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from springtide.core.errors import SetupError
from springtide.engine.models.config import ModelConfig, RopeScaling
from springtide.engine.weights.base import ROPE_FREQ_FACTORS
from springtide.text.gguf_metadata import TensorEntry, read_head

ARCHITECTURES = {"llama": "LlamaForCausalLM"}  # GGUF's word for it -> Hugging Face's

_TOP_LEVEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "rope_freqs.weight": ROPE_FREQ_FACTORS,
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")

_VALUES_AT_ONCE = 1 << 22  # dequantised float32 values held beside the model: 16 MB


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` is row-major, the reverse of the file's order. `offset` is in bytes from the file's start."""

    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile:
    """One GGUF file, mapped into memory.

    Raises:
        SetupError: not GGUF, of a version or tensor type we do not read, or shorter than its head says.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self.metadata, entries = read_head(path)
        try:
            tensors = {entry.name: _tensor_info(entry) for entry in entries}
            self._data = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise SetupError(f"{path} is not a whole GGUF file: {error}", hint="fetch the model again") from None
        end = max((info.offset + info.num_bytes for info in tensors.values()), default=0)
        if end > len(self._data):
            raise SetupError(
                f"{path} is cut short: its tensors end at byte {end}, the file at {len(self._data)}",
                hint="fetch the model again",
            )
        self.config = _config(self.metadata, tensors, self.where)
        self._tensors = {_hugging_face_name(name): info for name, info in tensors.items()}
        self.shapes: Mapping[str, tuple[int, ...]] = {name: info.shape for name, info in self._tensors.items()}

    def read(self, name: str, out: Tensor) -> None:
        info = self._tensors[name]
        packed = self._data[info.offset : info.offset + info.num_bytes].reshape(info.shape[0], -1)
        order = self._row_order(name, info.shape[0])
        rows_at_once = max(1, _VALUES_AT_ONCE * info.shape[0] // max(1, math.prod(info.shape)))
        try:
            for start in range(0, info.shape[0], rows_at_once):
                chunk = packed[start : start + rows_at_once] if order is None else packed[order[start:][:rows_at_once]]
                with np.errstate(all="ignore"):  # scales that are not numbers show later, in the logits
                    values = gguf.quants.dequantize(_typed(chunk, info), info.type)
                rows = out[start : start + rows_at_once]
                rows.copy_(torch.from_numpy(np.require(values, requirements="W").reshape(rows.shape)))
        except NotImplementedError:
            raise SetupError(
                f"tensor {name} in {self.where} is of type {info.type.name}, which can't be read",
                hint="use a Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, F16, BF16 or F32 file",
            ) from None

    def _row_order(self, name: str, rows: int) -> np.ndarray | None:
        """llama.cpp pairs rotary dimensions (2i, 2i+1), Hugging Face (i, i + half): its converter permuted the
        rows of q and k within each head; this undoes it."""
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}.get(name.split(".")[-2])
        if heads is None or self.config.architecture != "LlamaForCausalLM":
            return None
        return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _typed(chunk: np.ndarray, info: TensorInfo) -> np.ndarray:
    """Bytes as what `dequantize` wants: itself for block formats, the element type for plain floats."""
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}.get(info.type)
    return chunk if plain is None else np.ascontiguousarray(chunk).view(plain)


def _hugging_face_name(name: str) -> str:
    """Unknown names stay as they are: the model then says that it has no place for them."""
    block = _BLOCK.fullmatch(name)
    if block:
        layer, part, kind = block.groups()
        return f"model.layers.{layer}.{_BLOCK_NAMES[part]}.{kind}" if part in _BLOCK_NAMES else name
    return _TOP_LEVEL_NAMES.get(name, name)


def _config(metadata: dict[str, Any], tensors: dict[str, TensorInfo], where: str) -> ModelConfig:
    family = metadata.get("general.architecture")
    architecture = ARCHITECTURES.get(str(family))
    if architecture is None:
        raise SetupError(
            f"{where} holds a model of the architecture {family!r}, which is not supported",
            hint=f"supported in GGUF: {', '.join(sorted(ARCHITECTURES))}",
        )
    try:
        value = {key.removeprefix(f"{family}."): v for key, v in metadata.items()}
        num_heads = int(value["attention.head_count"])
        hidden_size = int(value["embedding_length"])
        head_dim = int(value.get("attention.key_length") or hidden_size // num_heads)
        if int(value.get("rope.dimension_count", head_dim)) != head_dim:
            raise SetupError(f"{where} rotates only a part of each head, which is not supported")
        return ModelConfig(
            architecture=architecture,
            num_layers=int(value["block_count"]),
            hidden_size=hidden_size,
            intermediate_size=int(value["feed_forward_length"]),
            num_heads=num_heads,
            num_kv_heads=int(value.get("attention.head_count_kv") or num_heads),
            head_dim=head_dim,
            vocab_size=tensors["token_embd.weight"].shape[0],
            context_length=int(value["context_length"]),
            norm_eps=float(value["attention.layer_norm_rms_epsilon"]),
            rope_theta=float(value.get("rope.freq_base", 10_000.0)),
            rope_scaling=_rope_scaling(value),
            tie_word_embeddings="output.weight" not in tensors,
            attention_bias="blk.0.attn_q.bias" in tensors,
            attention_output_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_up.bias" in tensors,
        )
    except KeyError as error:
        raise SetupError(
            f"{where} lacks {error.args[0]}", hint="the file is incomplete: fetch the model again"
        ) from None
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise SetupError(f"{where} describes no model that can be: {error}") from None


def _rope_scaling(value: dict[str, Any]) -> RopeScaling | None:
    kind = value.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(value["rope.scaling.factor"]))
    raise SetupError(f"rope scaling {kind!r} is not supported", hint="supported in GGUF: linear, and Llama 3's factors")


def _tensor_info(entry: TensorEntry) -> TensorInfo:
    """
    Raises:
        ValueError: a tensor that can't be.
    """
    name, shape = entry.name, entry.shape
    type = gguf.GGMLQuantizationType(entry.type)
    values_per_block, bytes_per_block = gguf.GGML_QUANT_SIZES[type]
    if 0 in shape or (len(shape) == 1 and values_per_block > 1):
        raise ValueError(f"tensor {name} is {type.name} of the impossible shape {list(shape)}")
    if shape[-1] % values_per_block:
        raise ValueError(f"tensor {name} has rows of {shape[-1]} values, not whole {type.name} blocks")
    return TensorInfo(shape, type, entry.offset, math.prod(shape) // values_per_block * bytes_per_block)
