"""A folder of safetensors with its config.json, in one file or in shards; memory-mapped.

A file is 8 bytes with the length of a JSON head, the head, which says for each tensor its type, shape and place, and
then the tensors (https://github.com/huggingface/safetensors). We read it ourselves, since the package's own reader
keeps all that it has read in memory, beside the model that was made of it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from springtide.core.errors import SetupError
from springtide.engine.weights import mxfp4
from springtide.engine.weights.mapping import MappedFile

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_BLOCKS, _SCALES = "_blocks", "_scales"  # what MXFP4 makes of one tensor
_OTHER_SENSES = ("vision_config", "audio_config")
_VALUES_AT_ONCE = 1 << 20  # read between two times that memory is given back


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of a shard; `offset` is in bytes from the file's start."""

    file: MappedFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsFolder:
    """Tensors of one folder. What is stored as MXFP4 is one tensor [experts, in, out], as in files that are not.

    Raises:
        SetupError: no weights there, a shard is missing or broken, the index is not what it should be.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._entries = {name: entry for path in _shards(folder) for name, entry in _read_shard(path)}
        self.shapes: Mapping[str, tuple[int, ...]] = dict(self._named_shapes())

    def read(self, name: str, out: Tensor) -> None:
        try:
            if name in self._entries:
                _read_plain(self._entries[name], out)
            else:
                _read_mxfp4(self._entries[name + _BLOCKS], self._entries[name + _SCALES], out)
        except (KeyError, OSError, RuntimeError) as error:
            raise SetupError(f"tensor {name} in {self.where} can't be read: {error}") from None

    def _named_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, entry in self._entries.items():
            if not self._is_mxfp4(name.removesuffix(_BLOCKS).removesuffix(_SCALES)):
                yield name, entry.shape
            elif name.endswith(_BLOCKS):
                experts, outputs, groups, _ = entry.shape
                yield name.removesuffix(_BLOCKS), (experts, groups * mxfp4.BLOCK, outputs)

    def _is_mxfp4(self, name: str) -> bool:
        """Whether the tensor of this name is there as blocks and scales that belong together."""
        blocks, scales = self._entries.get(name + _BLOCKS), self._entries.get(name + _SCALES)
        return (
            blocks is not None
            and scales is not None
            and blocks.dtype == scales.dtype == "U8"
            and len(scales.shape) == 3
            and blocks.shape == (*scales.shape, mxfp4.BLOCK // 2)
        )


def read_config(folder: Path, supported: Sequence[str] = ()) -> dict[str, Any]:
    """What `config.json` says, for a family to interpret. `supported` are the architectures to name in a refusal.

    Raises:
        SetupError: no or a broken config.json; or the folder holds what no family can run: an adapter, a model of
            images or sound, weights that are quantised in a way that we can't read.
    """
    path = folder / "config.json"
    hint = f"supported: {', '.join(supported)}" if supported else None
    if (folder / _ADAPTER).exists() and not _has_weights(folder):
        raise SetupError(f"{folder} holds a LoRA adapter, not a model: adapters are not supported", hint=hint)
    raw = _json(path)
    _refuse_other_senses(raw, hint)
    quantization = raw.get("quantization_config")
    if quantization and not isinstance(quantization, dict):
        raise SetupError(f"{path} is not a model configuration: its quantization_config is {quantization!r}")
    method = quantization.get("quant_method", "unknown") if quantization else None
    if method not in (None, "mxfp4"):
        raise SetupError(
            f"weights quantised with {method!r} are not supported", hint="use bf16 or MXFP4 safetensors, or GGUF"
        )
    return raw


def named_architecture(raw: Mapping[str, Any]) -> str:
    """The first of the architectures that a `config.json` names."""
    architectures = raw.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else "none"


def _refuse_other_senses(raw: Mapping[str, Any], hint: str | None) -> None:
    name = named_architecture(raw)
    if name.endswith("ForConditionalGeneration") or any(raw.get(key) for key in _OTHER_SENSES):
        raise SetupError(
            f"the architecture {name} is not supported: it takes more than the text before it (images, sound, or a "
            "text of its own to translate)",
            hint=hint,
        )


# -- files ---------------------------------------------------------------------------------------------------


def _has_weights(folder: Path) -> bool:
    return (folder / _SINGLE).exists() or (folder / _INDEX).exists()


def _shards(folder: Path) -> list[Path]:
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.exists():
        raise SetupError(
            f"{folder} holds neither {_SINGLE} nor {_INDEX}", hint="only safetensors and GGUF weights can be loaded"
        )
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise SetupError(f"{index} has no weight_map of tensor names to files")
    outside = [file for file in weight_map.values() if Path(file).name != file]
    if outside:
        raise SetupError(f"{index} points outside its folder: {outside[0]}")
    return [folder / file for file in sorted(set(weight_map.values()))]


def _read_shard(path: Path) -> list[tuple[str, _Entry]]:
    try:
        file = MappedFile(path)
        (head_bytes,) = struct.unpack("<Q", file.bytes(0, 8).tobytes())
        head = json.loads(file.bytes(8, head_bytes).tobytes())
        return [
            (name, _entry(file, name, line, 8 + head_bytes)) for name, line in head.items() if name != "__metadata__"
        ]
    except FileNotFoundError:
        raise SetupError(f"{path} is missing", hint="fetch the model again") from None
    except KeyError as error:
        raise SetupError(
            f"{path} is not a whole safetensors file: a tensor has no {error.args[0]}", hint="fetch the model again"
        ) from None
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise SetupError(f"{path} is not a whole safetensors file: {error}", hint="fetch the model again") from None


def _entry(file: MappedFile, name: str, line: Mapping[str, Any], base: int) -> _Entry:
    """
    Raises:
        KeyError, TypeError, ValueError: a line of the head that can't be.
    """
    dtype, shape = str(line["dtype"]), tuple(map(int, line["shape"]))
    start, end = map(int, line["data_offsets"])
    if not 0 <= start <= end <= len(file) - base:
        raise ValueError(f"tensor {name} ends at byte {base + end}, the file at {len(file)}")
    values = math.prod(shape)
    if min(shape, default=1) < 0 or (dtype in _DTYPES and values * _DTYPES[dtype].itemsize != end - start):
        raise ValueError(f"tensor {name} of {list(shape)} {dtype} does not take {end - start} bytes")
    return _Entry(file, dtype, shape, base + start, end - start)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise SetupError(f"{path} is missing", hint="a model folder holds config.json beside its weights") from None
    except (OSError, ValueError) as error:
        raise SetupError(f"{path} can't be read: {error}") from None
    if not isinstance(value, dict):
        raise SetupError(f"{path} is not a JSON object")
    return value


# -- values --------------------------------------------------------------------------------------------------


def _read_plain(entry: _Entry, out: Tensor) -> None:
    """
    Raises:
        RuntimeError: values of a type that we do not know.
    """
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise RuntimeError(f"its type is {entry.dtype}")
    flat = out.view(-1)
    for start in range(0, len(flat), _VALUES_AT_ONCE):
        count = min(_VALUES_AT_ONCE, len(flat) - start)
        offset = entry.offset + start * dtype.itemsize
        flat[start : start + count].copy_(entry.file.tensor(offset, (count,), dtype))
        entry.file.release(offset, count * dtype.itemsize)


def _read_mxfp4(blocks: _Entry, scales: _Entry, out: Tensor) -> None:
    """Blocks [experts, out, groups, 16] and scales [experts, out, groups] -> `out` [experts, 32 * groups, out]"""
    experts, outputs, groups = scales.shape
    rows_at_once = max(1, _VALUES_AT_ONCE // (groups * mxfp4.BLOCK))
    for expert in range(experts):
        for start in range(0, outputs, rows_at_once):
            count = min(rows_at_once, outputs - start)
            first = (expert * outputs + start) * groups  # of the blocks that are read now
            values = mxfp4.dequantise(
                _part(blocks, first, count * groups, mxfp4.BLOCK // 2).reshape(count, groups, -1),
                _part(scales, first, count * groups, 1).reshape(count, groups),
            )
            out[expert, :, start : start + count].copy_(torch.from_numpy(values).t())
            blocks.file.release(blocks.offset + first * mxfp4.BLOCK // 2, count * groups * mxfp4.BLOCK // 2)


def _part(entry: _Entry, first: int, count: int, size: int) -> Any:
    """Bytes of `count` blocks of `size` bytes, from the block `first` on."""
    return entry.file.bytes(entry.offset + first * size, count * size)
