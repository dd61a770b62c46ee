"""Which attention backend serves a model on a device."""

from __future__ import annotations

import torch

from springtide.core.errors import SetupError
from springtide.engine.attention.base import AttentionBackend
from springtide.engine.attention.numba_cpu import HEAD_DIM_MULTIPLE, NumbaAttention
from springtide.engine.attention.reference import ReferenceAttention
from springtide.engine.models.config import ModelConfig


def choose_attention(name: str, config: ModelConfig, dtype: torch.dtype) -> AttentionBackend:
    """The backend called `name`; "auto" takes the fastest that can do this model.

    Raises:
        SetupError: no backend of that name, or it can't do this model.
    """
    numba_fits = config.head_dim % HEAD_DIM_MULTIPLE == 0 and dtype in (torch.float32, torch.bfloat16)
    if name == "reference" or (name == "auto" and not numba_fits):
        return ReferenceAttention()
    if name not in ("auto", "numba"):
        raise SetupError(f"there is no attention backend {name!r}", hint="there are: auto, numba, reference")
    if not numba_fits:
        raise SetupError(
            f"the numba attention can't do heads of {config.head_dim} in {dtype}",
            hint=f"it wants a multiple of {HEAD_DIM_MULTIPLE}, in float32 or bfloat16; use attention=reference",
        )
    return NumbaAttention()
