"""What a model takes its tensors from. Knows shapes and names; a reader behind it knows the bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from springtide.core.errors import SetupError
from springtide.core.fetch import Progress, silent

# Divisors of the rotary frequencies, [head_dim / 2]: GGUF files of Llama 3 carry them, no Hugging Face file does.
ROPE_FREQ_FACTORS = "model.rotary_emb.freq_factors"

_NAMES_SHOWN = 4
_READING = "loading the weights"


class TensorReader(Protocol):
    """One checkpoint on disk, by Hugging Face names. Reading is lazy: only what is asked for is touched, and nothing
    of it stays in memory."""

    where: str
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str, out: Tensor) -> None:
        """Fill `out`, contiguous, of the tensor's shape and any dtype, converting on the way.

        Raises:
            SetupError: the bytes can't be read.
        """


class Weights:
    """Hands a model its tensors, and keeps account: at the end nothing may be missing, left over or mis-shaped.
    `progress` hears of each tensor, in bytes of the model's dtype."""

    def __init__(
        self, reader: TensorReader, dtype: torch.dtype, device: torch.device, progress: Progress = silent
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._reader = reader
        self._taken: set[str] = set()
        self._missing: list[str] = []
        self._progress = progress
        self._bytes_done = 0
        self._bytes_in_all = model_bytes(reader, dtype)

    def __contains__(self, name: str) -> bool:
        return name in self._reader.shapes

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of that name, in the model's dtype or in `dtype`.

        Raises:
            SetupError: it has another shape, or can't be read.
        """
        return self.stack([name], [shape], dtype=dtype)

    def stack(
        self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Several tensors one below the other, as one (fused projections), without a copy in between.

        Raises:
            SetupError: one has another shape, or can't be read.
        """
        for name, shape in zip(names, shapes, strict=True):
            self._check_shape(name, shape)  # before memory is taken for what a broken file claims
        rows = sum(shape[0] for shape in shapes)
        stacked = torch.empty((rows, *shapes[0][1:]), dtype=dtype or self.dtype, device=self.device)
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            self._fill(name, stacked[start : start + shape[0]])
            start += shape[0]
        return stacked

    def skip(self, name: str) -> None:
        """Say that a tensor is known and not wanted."""
        self._taken.add(name)

    def finish(self) -> None:
        """Close the account.

        Raises:
            SetupError: naming tensors that are missing, or that the model has no place for.
        """
        if self._missing:
            raise SetupError(
                f"{self._reader.where} lacks {_some(self._missing)}",
                hint="the file is incomplete, or its configuration speaks of another model",
            )
        extra = sorted(set(self._reader.shapes) - self._taken)
        if extra:
            raise SetupError(
                f"{self._reader.where} has tensors that this architecture has no place for: {_some(extra)}",
                hint="the model is a variant that is not supported",
            )
        self._progress(_READING, self._bytes_in_all, self._bytes_in_all)

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._reader.shapes.get(name, shape)
        if found != shape:
            raise SetupError(
                f"tensor {name} in {self._reader.where} has shape {list(found)}, expected {list(shape)}",
                hint="the file and its configuration do not belong together",
            )

    def _fill(self, name: str, out: Tensor) -> None:
        self._taken.add(name)
        if name not in self:
            self._missing.append(name)
            return
        self._reader.read(name, out)
        self._bytes_done += out.numel() * self.dtype.itemsize
        self._progress(_READING, self._bytes_done, self._bytes_in_all)


def model_bytes(reader: TensorReader, dtype: torch.dtype) -> int:
    """Bytes that all tensors take in `dtype`, known from their shapes alone."""
    return sum(math.prod(shape) for shape in reader.shapes.values()) * dtype.itemsize


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
