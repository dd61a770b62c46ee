"""Which attention backend serves a model on a device."""

from __future__ import annotations

import torch

from springtide.core.errors import SetupError
from springtide.engine.attention.base import AttentionBackend
from springtide.engine.attention.numba_cpu import DTYPES, NumbaAttention
from springtide.engine.attention.reference import ReferenceAttention
from springtide.engine.models.config import ModelConfig


def choose_attention(name: str, config: ModelConfig, dtype: torch.dtype) -> AttentionBackend:
    """The backend called `name`; "auto" takes the fastest that can do this model.

    Raises:
        SetupError: no backend of that name, or it can't do this model.
    """
    if name == "reference" or (name == "auto" and dtype not in DTYPES):
        return ReferenceAttention()
    if name not in ("auto", "numba"):
        raise SetupError(f"there is no attention backend {name!r}", hint="there are: auto, numba, reference")
    if dtype not in DTYPES:
        raise SetupError(
            f"the numba attention can't do {dtype}", hint="use float32 or bfloat16, or attention=reference"
        )
    return NumbaAttention()
