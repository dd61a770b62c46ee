"""Which architectures there are, and how a model is loaded from its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from springtide.core.errors import SetupError
from springtide.core.fetch import Progress, silent
from springtide.core.store import ModelFiles
from springtide.engine.attention.base import AttentionBackend, Pages
from springtide.engine.inputs import ForwardInputs
from springtide.engine.linear import Linear
from springtide.engine.models import (
    baichuan,
    gemma3,
    glm4,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
)
from springtide.engine.models.config import ModelConfig
from springtide.engine.models.family import Family
from springtide.engine.weights.base import TensorReader, Weights, model_bytes
from springtide.engine.weights.gguf import GGUFFile
from springtide.engine.weights.safetensors import SafetensorsFolder, named_architecture, read_config


class Model(Protocol):
    """What the runner asks of any family."""

    config: ModelConfig

    def forward(self, inputs: ForwardInputs, pool: Pages, attention: AttentionBackend) -> Tensor:
        """Last hidden states of `inputs.logit_rows`, [logit rows, hidden]; stores the step's K/V in `pool`."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> float32 [rows, vocab]"""

    def products(self) -> Mapping[str, Linear]:
        """One product of each shape that there is, by a name that its author would know."""


FAMILIES: dict[str, Family] = {
    "BaichuanForCausalLM": baichuan.FAMILY,
    "Gemma3ForCausalLM": gemma3.FAMILY,
    "Glm4ForCausalLM": glm4.FAMILY,
    "GlmForCausalLM": glm4.GLM,
    "GptOssForCausalLM": gpt_oss.FAMILY,
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": mistral.FAMILY,
    "MixtralForCausalLM": mixtral.FAMILY,
    "Qwen2ForCausalLM": qwen2.FAMILY,
    "Qwen3ForCausalLM": qwen3.FAMILY,
    "Qwen3MoeForCausalLM": qwen3_moe.FAMILY,
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model whose head was read: its shape is known, of its weights nothing was touched yet."""

    family: Family
    config: ModelConfig
    reader: TensorReader

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that the weights take in `dtype`."""
        return model_bytes(self.reader, dtype)

    def load(self, dtype: torch.dtype, device: torch.device, progress: Progress = silent) -> Model:
        """The model, its weights converted to `dtype`.

        Raises:
            SetupError: weights that are broken, missing, left over, or of other shapes than the head says.
        """
        return self.family.model(self.config, Weights(self.reader, dtype, device, progress))


def open_checkpoint(files: ModelFiles) -> Checkpoint:
    """What these files hold.

    Raises:
        SetupError: an architecture we do not have, or a head that is broken or describes no model that can be.
    """
    return _open_gguf(files.path) if files.format == "gguf" else _open_folder(files.path)


def _open_folder(folder: Path) -> Checkpoint:
    raw = read_config(folder, sorted(FAMILIES))
    architecture = named_architecture(raw)
    family = FAMILIES.get(architecture)
    if family is None:
        raise SetupError(f"the architecture {architecture} is not supported", hint=_supported())
    return Checkpoint(family, _read(family, raw, str(folder / "config.json")), SafetensorsFolder(folder))


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    for architecture, family in FAMILIES.items():
        if family.gguf and file.fits(family.gguf):
            raw = file.raw_config(family.gguf.implied) | {"architectures": [architecture]}
            file.use(family.gguf)
            config = _read(family, raw, str(path))
            _refuse_unknown_window(config, raw, str(path))
            return Checkpoint(family, config, file)
    known = sorted({family.gguf.architecture for family in FAMILIES.values() if family.gguf})
    raise SetupError(
        f"{path} holds a model of the architecture {file.architecture!r}, which is not supported",
        hint=f"supported in GGUF: {', '.join(known)}",
    )


def _refuse_unknown_window(config: ModelConfig, raw: Mapping[str, Any], where: str) -> None:
    """GGUF has one word for several families, of which not all know windows."""
    window = raw.get("sliding_window") or config.context_length
    if window < config.context_length and all(layer.window is None for layer in config.layers):
        raise SetupError(
            f"{where} asks for a window of {window} tokens, which is not supported in GGUF files of "
            f"{config.architecture}",
            hint="take its safetensors",
        )


def _supported() -> str:
    return f"supported: {', '.join(sorted(FAMILIES))}"


def _read(family: Family, raw: Mapping[str, Any], where: str) -> ModelConfig:
    try:
        return family.read_config(raw)
    except SetupError as error:
        raise SetupError(error.message, hint=error.hint or _supported()) from None
    except KeyError as error:
        raise SetupError(f"{where} is not a model configuration: it lacks {error.args[0]}") from None
    except (AttributeError, IndexError, OverflowError, TypeError, ValueError, ZeroDivisionError) as error:
        raise SetupError(f"{where} is not a model configuration: {error}") from None
