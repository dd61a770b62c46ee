"""A folder of safetensors with its config.json, in one file or in shards; memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from springtide.core.errors import SetupError
from springtide.engine.models.config import ModelConfig, RopeScaling

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class SafetensorsFolder:
    """Tensors of one folder.

    Raises:
        SetupError: no weights there, a shard is missing or broken, the index is not what it should be.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._files: dict[str, Any] = {}
        self.shapes: Mapping[str, tuple[int, ...]] = self._open(folder)

    def read(self, name: str, out: Tensor) -> None:
        try:
            out.copy_(self._files[name].get_tensor(name))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise SetupError(f"tensor {name} in {self.where} can't be read: {error}") from None

    def _open(self, folder: Path) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for path in _shards(folder):
            try:
                file: Any = safe_open(path, framework="pt", device="cpu")
                for name in file.keys():  # noqa: SIM118 -- not a dict
                    shapes[name] = tuple(file.get_slice(name).get_shape())
                    self._files[name] = file
            except FileNotFoundError:
                raise SetupError(f"{path} is missing", hint="fetch the model again") from None
            except (SafetensorError, OSError) as error:
                raise SetupError(
                    f"{path} is not a whole safetensors file: {error}", hint="fetch the model again"
                ) from None
        return shapes


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


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig that `config.json` describes.

    Raises:
        SetupError: no or a broken config.json, or a feature that we would get wrong.
    """
    path = folder / "config.json"
    raw = _json(path)
    try:
        return _config(raw)
    except KeyError as error:
        raise SetupError(f"{path} is not a model configuration: it lacks {error.args[0]}") from None
    except (AttributeError, IndexError, OverflowError, TypeError, ValueError, ZeroDivisionError) as error:
        raise SetupError(f"{path} is not a model configuration: {error}") from None


def _config(raw: dict[str, Any]) -> ModelConfig:
    _refuse_what_would_be_wrong(raw)
    num_heads = int(raw["num_attention_heads"])
    # transformers 5 keeps everything rotary in one dictionary, older files in two places
    rope = {"rope_theta": raw.get("rope_theta") or 10_000.0} | (
        raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    )
    return ModelConfig(
        architecture=str(raw["architectures"][0]),
        num_layers=int(raw["num_hidden_layers"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=int(raw.get("head_dim") or raw["hidden_size"] // num_heads),
        vocab_size=int(raw["vocab_size"]),
        context_length=int(raw["max_position_embeddings"]),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=_rope_scaling(rope),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        attention_output_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
    )


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise SetupError(f"rope scaling {kind!r} is not supported", hint="supported: linear, llama3")


def _refuse_what_would_be_wrong(raw: dict[str, Any]) -> None:
    """Features that change the arithmetic, and that we do not have: better refused than silently wrong."""
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise SetupError(f"weights quantised with {method!r} are not supported", hint="use bf16 safetensors or GGUF")
    if raw.get("hidden_act", "silu") != "silu":
        raise SetupError(f"activation {raw['hidden_act']!r} is not supported", hint="supported: silu")
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise SetupError("partial rotary embeddings are not supported")


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
