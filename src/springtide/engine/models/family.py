"""What one file of this package says about an architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from springtide.engine.models.config import ModelConfig
from springtide.engine.models.decoder import Decoder
from springtide.engine.models.reading import RawConfig
from springtide.engine.weights.gguf import GGUFNames


@dataclass(frozen=True, slots=True)
class Family:
    """How a checkpoint is understood (`read_config`), what runs it, and what GGUF calls it; None: not in GGUF."""

    read_config: Callable[[RawConfig], ModelConfig]
    model: type[Decoder]
    gguf: GGUFNames | None = None
