"""A GGUF file as Hugging Face-style tensors and a ModelConfig; memory-mapped, dequantised on the way out.

The header is parsed here, not by the `gguf` package's reader, which spends seconds on the vocabulary's arrays;
the block formats are the package's (`gguf.quants`).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
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

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_VALUES_AT_ONCE = 1 << 22  # dequantised float32 values held beside the model: 16 MB


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` is row-major, the reverse of the file's order. `offset` is in bytes from the file's start."""

    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile:
    """One GGUF file, mapped into memory. `metadata` has its scalars and strings; arrays are passed over.

    Raises:
        SetupError: not GGUF, of a version or tensor type we do not read, or shorter than its header says.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        try:
            self._data = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:  # ValueError: an empty file can't be mapped
            raise SetupError(f"{path} can't be read: {error}") from None
        try:
            self.metadata, tensors = _parse(self._data.data)
        except (
            struct.error,
            UnicodeDecodeError,
            IndexError,
            KeyError,
            ValueError,
            OverflowError,
            RecursionError,
        ) as error:
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


def _parse(data: memoryview) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Scalar and string metadata, and where each tensor lies."""
    cursor = _Cursor(data)
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"version {version} is unknown")
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string()
        value = cursor.value(cursor.scalar("I"))
        if value is not None:
            metadata[key] = value
    infos = list(_tensor_infos(cursor, num_tensors))
    alignment = int(metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT))
    base = -(-cursor.at // alignment) * alignment
    tensors = {
        name: TensorInfo(shape, type, base + offset, num_bytes) for name, shape, type, offset, num_bytes in infos
    }
    return metadata, tensors


def _tensor_infos(
    cursor: _Cursor, count: int
) -> Iterator[tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int, int]]:
    for _ in range(count):
        name = cursor.string()
        num_dimensions = cursor.scalar("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {num_dimensions} dimensions")
        shape = tuple(reversed([cursor.scalar("Q") for _ in range(num_dimensions)]))
        type = gguf.GGMLQuantizationType(cursor.scalar("I"))
        offset = cursor.scalar("Q")
        values_per_block, bytes_per_block = gguf.GGML_QUANT_SIZES[type]
        if 0 in shape or (num_dimensions == 1 and values_per_block > 1):
            raise ValueError(f"tensor {name} is {type.name} of the impossible shape {list(shape)}")
        if shape[-1] % values_per_block:
            raise ValueError(f"tensor {name} has rows of {shape[-1]} values, not whole {type.name} blocks")
        yield name, shape, type, offset, math.prod(shape) // values_per_block * bytes_per_block


class _Cursor:
    """Reads GGUF's primitives one after the other."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        self.skip(size)
        return bytes(self._data[self.at - size : self.at])

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """A scalar or a string; None for an array, which is passed over."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        self._pass_array()
        return None

    def _pass_array(self) -> None:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            self._pass_strings(count)
        elif kind == _ARRAY:
            for _ in range(count):
                self._pass_array()
        else:
            self.skip(count * struct.calcsize(_SCALARS[kind]))

    def _pass_strings(self, count: int) -> None:
        """A vocabulary has 100,000 of them: no call and no copy for each."""
        length_at = struct.Struct("<Q").unpack_from
        at, data = self.at, self._data
        for _ in range(count):
            at += 8 + length_at(data, at)[0]
        self.skip(at - self.at)

    def skip(self, size: int) -> None:
        if size > len(self._data) - self.at:
            raise ValueError("it ends in the middle of its header")
        self.at += size
