"""A file's bytes in memory without reading them: the system fetches a page when it is touched. Knows no format."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_AROUND = 2**21  # the system maps pages round a touched one, to its taste: a huge page at most


class MappedFile:
    """Views of a file's bytes, and the means to give back the memory of those that are no longer needed. A file of
    gigabytes that is copied piece by piece so never lies in memory beside its copy.

    Raises:
        OSError: the file can't be opened.
        ValueError: it is empty.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # A private copy-on-write map: nobody writes to it, but torch wants its memory writable.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __len__(self) -> int:
        return len(self._map)

    def bytes(self, offset: int, size: int) -> np.ndarray:
        """uint8 [size] from `offset` on, a view."""
        return np.frombuffer(self._map, dtype=np.uint8, count=size, offset=offset)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The values from `offset` on, a view. At least one value."""
        return torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)

    def release(self, offset: int, size: int) -> None:
        """Give the memory behind these bytes back; who looks at them again waits for the disk, or its cache."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on every system
            start, end = offset - offset % _AROUND, offset + size + -(offset + size) % _AROUND
            self._map.madvise(mmap.MADV_DONTNEED, start, min(end, len(self._map)) - start)
