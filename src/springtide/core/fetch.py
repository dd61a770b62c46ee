"""What all ways of fetching a model have in common: how far they are, and what to say to somebody without a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int | None], None]
"""What is being done, bytes done, bytes in all (None: not known)."""

LOCAL_MODEL_HINT = "or name a model that lies here: a folder of safetensors, a .gguf file"


def silent(what: str, done: int, total: int | None) -> None:
    """The Progress of somebody who does not look."""
