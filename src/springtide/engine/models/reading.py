"""From the fields of a `config.json` to a ModelConfig: what most families have in common.

GGUF files come through here too: their reader translates their metadata to the same fields. A missing or impossible
field raises KeyError, TypeError or ValueError; `registry` makes a SetupError of it that names the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from springtide.core.errors import SetupError
from springtide.engine.models.config import MOST_LAYERS, Activation, LayerConfig, ModelConfig, Rope, RopeScaling

RawConfig: TypeAlias = Mapping[str, Any]

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_common(
    raw: RawConfig,
    *,
    layers: Sequence[LayerConfig] | None = None,
    activation: str = "silu",
    kind: type[ModelConfig] = ModelConfig,
    **changes: Any,
) -> ModelConfig:
    """The ModelConfig of a family: fields that all of them call alike, and `changes`. By default every layer is
    dense and sees everything; `activation` is the only one that this family knows; `kind` is the class of a family
    that has fields of its own.

    Raises:
        SetupError: a feature that would change the arithmetic, and that we do not have.
    """
    found = raw.get("hidden_activation") or raw.get("hidden_act") or activation
    if found != activation:
        raise SetupError(f"activation {found!r} is not supported here", hint=f"supported: {activation}")
    num_heads = int(raw["num_attention_heads"])
    fields: dict[str, Any] = {
        "architecture": str(raw["architectures"][0]),
        "layers": tuple(layers or uniform_layers(raw)),
        "hidden_size": int(raw["hidden_size"]),
        "intermediate_size": int(raw["intermediate_size"]),
        "num_heads": num_heads,
        "num_kv_heads": int(raw.get("num_key_value_heads") or num_heads),
        "head_dim": head_dim(raw),
        "vocab_size": int(raw["vocab_size"]),
        "context_length": _context_length(raw),
        "norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "activation": _ACTIVATIONS[activation],
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "attention_bias": bool(raw.get("attention_bias", False)),
    }
    return kind(**fields | changes)


def uniform_layers(raw: RawConfig, **layer: Any) -> list[LayerConfig]:
    """Layers that are all alike: rotary over the whole head unless `layer` says otherwise."""
    return [LayerConfig(**{"rope": read_rope(raw)} | layer)] * num_layers(raw)


def num_layers(raw: RawConfig) -> int:
    """Checked before anybody makes a list of that length."""
    count = int(raw["num_hidden_layers"])
    if not 1 <= count <= MOST_LAYERS:
        raise ValueError(f"{count} layers are out of all reason")
    return count


def sliding_layers(raw: RawConfig, default: Callable[[int], bool] = lambda index: False) -> list[bool]:
    """Which layers see just a window: as `layer_types` says, in files that have none as the family's `default` does.

    Raises:
        SetupError: a kind of layer that we do not have.
    """
    count = num_layers(raw)
    kinds = raw.get("layer_types")
    if kinds is None:
        return [default(index) for index in range(count)]
    if strange := set(kinds) - {"full_attention", "sliding_attention"}:
        raise SetupError(f"layers of the kind {min(strange)!r} are not supported")
    if len(kinds) != count:
        raise ValueError(f"{count} layers, but layer_types names {len(kinds)}")
    return [kind == "sliding_attention" for kind in kinds]


def head_dim(raw: RawConfig) -> int:
    return int(raw.get("head_dim") or int(raw["hidden_size"]) // int(raw["num_attention_heads"]))


def read_rope(raw: RawConfig, *, kind: str | None = None, theta: float = 10_000.0, interleaved: bool = False) -> Rope:
    """Rotary positions of all layers, or of those of one `kind` where a file tells kinds apart. `theta` is that of
    files which name none."""
    found = _rotary(raw)
    if kind is not None and kind in found:
        found = found[kind]
    theta = float(found.get("rope_theta") or raw.get("rope_theta") or theta)
    part = float(found.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0)
    return Rope(theta, int(head_dim(raw) * part), _scaling(found, raw), interleaved)


def _rotary(raw: RawConfig) -> RawConfig:
    """transformers 5 keeps everything rotary in one dictionary; older files only the scaling, the rest beside it."""
    found: RawConfig = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    return found


def _context_length(raw: RawConfig) -> int:
    """Tokens that the model was made for. YaRN is switched on by adding it to a file whose own number then stays that
    of the original context."""
    trained, rope = int(raw["max_position_embeddings"]), _rotary(raw)
    if (rope.get("rope_type") or rope.get("type")) != "yarn" or not rope.get("original_max_position_embeddings"):
        return trained
    return max(trained, int(rope["original_max_position_embeddings"] * rope["factor"]))


def _scaling(rope: RawConfig, raw: RawConfig) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    original = int(rope.get("original_max_position_embeddings") or raw["max_position_embeddings"])
    if kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return RopeScaling("llama3", float(rope["factor"]), low, high, original)
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            factor=float(rope["factor"]),
            original_context_length=original,
            beta_fast=float(rope.get("beta_fast") or 32.0),
            beta_slow=float(rope.get("beta_slow") or 1.0),
            attention_factor=_attention_factor(rope),
            # Beside the dictionary it stands for files that can't say it.
            truncate=bool(rope.get("truncate", raw.get("truncate", True))),
        )
    raise SetupError(f"rope scaling {kind!r} is not supported", hint="supported: linear, llama3, yarn")


def _attention_factor(rope: RawConfig) -> float:
    """What YaRN multiplies cosine and sine by; DeepSeek's two mscales, where given, instead of the paper's one."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor = float(rope["factor"])
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    if above and below:
        return _mscale(factor, float(above)) / _mscale(factor, float(below))
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
