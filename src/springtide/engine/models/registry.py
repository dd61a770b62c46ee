"""Which architectures there are, and how a model is loaded from its files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from springtide.core.errors import SetupError
from springtide.core.store import ModelFiles
from springtide.engine.attention.base import AttentionBackend, Pages
from springtide.engine.inputs import ForwardInputs
from springtide.engine.linear import Linear
from springtide.engine.models.config import ModelConfig
from springtide.engine.models.llama import Llama
from springtide.engine.weights.base import TensorReader, Weights
from springtide.engine.weights.gguf import GGUFFile
from springtide.engine.weights.safetensors import SafetensorsFolder, read_config


class Model(Protocol):
    """What the runner asks of any family."""

    config: ModelConfig

    def forward(self, inputs: ForwardInputs, pool: Pages, attention: AttentionBackend) -> Tensor:
        """Last hidden states of `inputs.logit_rows`, [logit rows, hidden]; stores the step's K/V in `pool`."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> float32 [rows, vocab]"""

    def products(self) -> Mapping[str, Linear]:
        """One product of each shape that there is, by a name that its author would know."""


ARCHITECTURES: dict[str, type[Llama]] = {
    "LlamaForCausalLM": Llama,
}


def load_model(files: ModelFiles, dtype: torch.dtype, device: torch.device) -> tuple[Model, ModelConfig]:
    """The model of these files, its weights converted to `dtype`.

    Raises:
        SetupError: an architecture we do not have, or files that are broken or do not fit together.
    """
    config, reader = _open(files)
    return ARCHITECTURES[config.architecture](config, Weights(reader, dtype, device)), config


def weight_bytes(files: ModelFiles, dtype: torch.dtype) -> int:
    """Bytes that the weights of these files take in `dtype`, known from their headers alone.

    Raises:
        SetupError: as `load_model`.
    """
    _, reader = _open(files)
    return sum(math.prod(shape) for shape in reader.shapes.values()) * dtype.itemsize


def _open(files: ModelFiles) -> tuple[ModelConfig, TensorReader]:
    if files.format == "gguf":
        file = GGUFFile(files.path)
        _check_supported(file.config.architecture)
        return file.config, file
    config = read_config(files.path)
    _check_supported(config.architecture)
    return config, SafetensorsFolder(files.path)


def _check_supported(architecture: str) -> None:
    if architecture not in ARCHITECTURES:
        raise SetupError(
            f"the architecture {architecture} is not supported", hint=f"supported: {', '.join(sorted(ARCHITECTURES))}"
        )
