"""GGUF files: metadata and tensors, by Hugging Face names once a family has said what it calls them. Tensors are
memory-mapped and dequantised on the way out.

The head is read by `springtide.text.gguf_metadata`, its entries are translated by `gguf_config`; the block formats
are those of the `gguf` package.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from springtide.core.errors import SetupError
from springtide.engine.weights.base import ROPE_FREQ_FACTORS
from springtide.engine.weights.gguf_config import translate
from springtide.engine.weights.mapping import MappedFile
from springtide.text.gguf_metadata import TensorEntry, read_head

_TOP_LEVEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "rope_freqs.weight": ROPE_FREQ_FACTORS,
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_EXPERT = "{e}"
_NORM = "norm.weight"  # the end of every norm's name

_Type = gguf.GGMLQuantizationType
_PLAIN = {_Type.F32: torch.float32, _Type.F16: torch.float16, _Type.BF16: torch.bfloat16}

_VALUES_AT_ONCE = 1 << 20  # dequantised float32 values held beside the model: 4 MB


@dataclass(frozen=True, slots=True)
class GGUFNames:
    """What the GGUF files of one architecture call things, and how they differ from Hugging Face's.

    architecture: GGUF's word for it. extra: further names of a layer's parts, or other ones, without their
    ".weight" or ".bias"; "{e}" stands for an expert's number. rotated_pairs: the rows of q and k were reordered to
    pairs (2i, 2i + 1). norm_offset: was added to the weight of every norm. mixture: there are experts; some
    architectures share a word with and without. implied: fields of a config.json that these files leave unsaid.
    """

    architecture: str
    extra: Mapping[str, str] = field(default_factory=dict)
    rotated_pairs: bool = False
    norm_offset: float = 0.0
    mixture: bool = False
    implied: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` is row-major, the reverse of the file's order. `offset` is in bytes from the file's start. `heads` is
    not 0 where the rows of that many heads are to be put back in order; `shift` is to be added to each value."""

    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    heads: int = 0
    shift: float = 0.0

    @property
    def num_bytes(self) -> int:
        values_per_block, bytes_per_block = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // values_per_block * bytes_per_block


class GGUFFile:
    """One GGUF file, mapped into memory. Before `use`, its tensors have GGUF's names.

    Raises:
        SetupError: not GGUF, of a version or tensor type we do not read, shorter than its head says, one part of
            several, or an adapter.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self.metadata, entries = read_head(path)
        self._refuse_parts_and_adapters()
        try:
            tensors = {entry.name: _tensor_info(entry) for entry in entries}
            self._file = MappedFile(path)
        except (OSError, ValueError, KeyError) as error:
            raise SetupError(f"{path} is not a whole GGUF file: {error}", hint="fetch the model again") from None
        end = max((info.offset + info.num_bytes for info in tensors.values()), default=0)
        if end > len(self._file):
            raise SetupError(
                f"{path} is cut short: its tensors end at byte {end}, the file at {len(self._file)}",
                hint="fetch the model again",
            )
        self._name(tensors)

    @property
    def architecture(self) -> str:
        """GGUF's word for it."""
        return str(self.metadata.get("general.architecture", ""))

    def raw_config(self, implied: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The metadata as the fields of a config.json; `implied` are those that the file does not have.

        Raises:
            SetupError: a value that can't be, or a feature that would change the arithmetic and has no such field.
        """
        return {**(implied or {}), **translate(self.architecture, self.metadata, self.shapes, self.where)}

    def fits(self, names: GGUFNames) -> bool:
        """Whether the file is of the architecture that `names` are for."""
        has_experts = bool(self.metadata.get(f"{self.architecture}.expert_count"))
        return names.architecture == self.architecture and names.mixture == has_experts

    def use(self, names: GGUFNames) -> None:
        """Speak Hugging Face's names from now on, as `names` translates them. Unknown ones stay as they are: the
        model then says that it has no place for them.

        Raises:
            SetupError: the heads, of which rows are to be put in order, do not fit the file.
        """
        table = _LAYER_NAMES | dict(names.extra)
        tensors = dict(_translated(self._tensors, table))
        for name, info in tensors.items():
            if name.endswith(_NORM):
                tensors[name] = replace(info, shift=-names.norm_offset)
            elif names.rotated_pairs and (key := _head_count_key(name)):
                tensors[name] = replace(info, heads=self._head_count(key, info.shape[0]))
        self._name(tensors)

    def read(self, name: str, out: Tensor) -> None:
        info = self._tensors[name]
        num_rows = info.shape[0]
        row_bytes = info.num_bytes // num_rows
        rows_at_once = max(1, _VALUES_AT_ONCE * num_rows // math.prod(info.shape))
        order = None if info.heads == 0 else _halves_of(info.heads, num_rows)
        try:
            for start in range(0, num_rows, rows_at_once):
                stop = min(num_rows, start + rows_at_once)
                part = replace(info, offset=info.offset + start * row_bytes, shape=(stop - start, *info.shape[1:]))
                values = self._values(part)
                if order is None:
                    out[start:stop].copy_(values)
                else:
                    out[order[start:stop]] = values.to(out.dtype)
                self._file.release(part.offset, part.num_bytes)
        except NotImplementedError:
            raise SetupError(
                f"tensor {name} in {self.where} is of type {info.type.name}, which can't be read",
                hint="use a Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, F16, BF16 or F32 file",
            ) from None

    def _name(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = tensors
        self.shapes: Mapping[str, tuple[int, ...]] = {name: info.shape for name, info in tensors.items()}

    def _values(self, info: TensorInfo) -> Tensor:
        """Rows as they lie in the file, of its own precision where it is a plain type, else float32."""
        if info.type in _PLAIN:
            values = self._file.tensor(info.offset, info.shape, _PLAIN[info.type])
        else:
            packed = self._file.bytes(info.offset, info.num_bytes).reshape(info.shape[0], -1)
            with np.errstate(all="ignore"):  # scales that are not numbers show later, in the logits
                values = torch.from_numpy(gguf.quants.dequantize(packed, info.type).reshape(info.shape))
        return values.float() + info.shift if info.shift else values

    def _head_count(self, key: str, num_rows: int) -> int:
        """How many heads lie in rows of queries or keys."""
        value = {name.removeprefix(f"{self.architecture}."): entry for name, entry in self.metadata.items()}
        heads = value.get(key) or value.get("attention.head_count")
        if not isinstance(heads, int) or heads < 1 or num_rows % (2 * heads):
            raise SetupError(f"{self.where} describes no model that can be: {heads} heads in {num_rows} rows")
        if value.get("rope.dimension_count", num_rows // heads) != num_rows // heads:
            raise SetupError(f"{self.where} rotates only a part of each head, which is not supported here")
        return heads

    def _refuse_parts_and_adapters(self) -> None:
        if self.metadata.get("general.type") == "adapter":
            raise SetupError(
                f"{self.where} is a LoRA adapter, which is not supported", hint="merge it into the model it is for"
            )
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise SetupError(
                f"{self.where} is one of {self.metadata['split.count']} parts of a model",
                hint="join them first: llama-gguf-split --merge",
            )


def _translated(tensors: Mapping[str, TensorInfo], table: Mapping[str, str]) -> Iterator[tuple[str, TensorInfo]]:
    """Every tensor by its new name; one that holds all experts of a layer becomes one tensor for each."""
    for name, info in tensors.items():
        layer_tensor = _LAYER_TENSOR.fullmatch(name)
        if layer_tensor is None or layer_tensor[2] not in table:
            yield _TOP_LEVEL_NAMES.get(name, name), info
            continue
        layer, part, kind = layer_tensor.groups()
        new_name = f"model.layers.{layer}.{table[part]}.{kind}"
        if _EXPERT not in new_name:
            yield new_name, info
            continue
        size = info.num_bytes // info.shape[0]
        for expert in range(info.shape[0]):
            of_one = replace(info, shape=info.shape[1:], offset=info.offset + expert * size)
            yield new_name.replace(_EXPERT, str(expert)), of_one


def _head_count_key(name: str) -> str | None:
    """The entry that tells how many heads lie in a tensor's rows, if its rows are those of queries or keys."""
    if name.endswith(("self_attn.q_proj.weight", "self_attn.q_proj.bias")):
        return "attention.head_count"
    if name.endswith(("self_attn.k_proj.weight", "self_attn.k_proj.bias")):
        return "attention.head_count_kv"
    return None


def _halves_of(heads: int, num_rows: int) -> Tensor:
    """Where each row of q or k belongs. llama.cpp pairs rotary dimensions (2i, 2i + 1), Hugging Face (i, i + half):
    its converter permuted the rows within each head; this undoes it."""
    return torch.arange(num_rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _tensor_info(entry: TensorEntry) -> TensorInfo:
    """
    Raises:
        ValueError: a tensor that can't be.
    """
    name, shape = entry.name, entry.shape
    type = gguf.GGMLQuantizationType(entry.type)
    values_per_block, _ = gguf.GGML_QUANT_SIZES[type]
    if 0 in shape or (len(shape) == 1 and values_per_block > 1):
        raise ValueError(f"tensor {name} is {type.name} of the impossible shape {list(shape)}")
    if shape[-1] % values_per_block:
        raise ValueError(f"tensor {name} has rows of {shape[-1]} values, not whole {type.name} blocks")
    return TensorInfo(shape, type, entry.offset)
