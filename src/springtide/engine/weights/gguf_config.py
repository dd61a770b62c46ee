"""The entries of a GGUF head as the fields of a Hugging Face config.json: a table, and no model's arithmetic.

The entries' names are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from springtide.core.errors import SetupError

_FIELDS: dict[str, tuple[str, ...]] = {
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size",),
    "context_length": ("max_position_embeddings",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.sliding_window": ("sliding_window",),
    "rope.freq_base": ("rope_theta",),
    "rope.freq_base_swa": ("rope_local_base_freq",),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
}

_SCALING_FIELDS = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}

# Entries that change the arithmetic and have no field above, with the values that change nothing: better refused than
# silently wrong.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "router_logit_softcapping": (0.0,),
    "use_parallel_residual": (False,),
}

# Where a file has both, they must be equal: we know only one of them.
_EQUAL = {
    "attention.value_length": "attention.key_length",
    "attention.key_length_swa": "attention.key_length",
    "attention.value_length_swa": "attention.key_length",
    "rope.dimension_count_swa": "rope.dimension_count",
}


def translate(
    architecture: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Any]:
    """The fields that the entries of `architecture`, and the tensors' names and shapes, tell.

    Raises:
        SetupError: naming `where`: a value that can't be, or an entry that would change the arithmetic and has no
            field.
    """
    prefix = f"{architecture}."
    value = {key.removeprefix(prefix): entry for key, entry in metadata.items() if key.startswith(prefix)}
    pattern = value.pop("attention.sliding_window_pattern", None)
    try:
        value = {key: _one(key, entry) for key, entry in value.items()}
        _refuse_what_would_be_wrong(value)
        return {
            **{field: value[key] for key, fields in _FIELDS.items() if key in value for field in fields},
            **_sliding(pattern),
            **_rope(value),
            **_told_by_tensors(shapes),
        }
    except KeyError as error:
        raise SetupError(
            f"{where} lacks {error.args[0]}", hint="the file is incomplete: fetch the model again"
        ) from None
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise SetupError(f"{where} describes no model that can be: {error}") from None


def _one(key: str, entry: Any) -> Any:
    """An entry that may say for each layer what we know for all."""
    if not isinstance(entry, list):
        return entry
    if not entry or any(each != entry[0] for each in entry):
        raise ValueError(f"{key} differs from layer to layer, which is not supported")
    return entry[0]


def _refuse_what_would_be_wrong(value: Mapping[str, Any]) -> None:
    for key, neutral in _NEUTRAL.items():
        if key in value and value[key] not in neutral:
            raise ValueError(f"{key} {value[key]} is not supported")
    for key, other in _EQUAL.items():
        if key in value and other in value and value[key] != value[other]:
            raise ValueError(f"{key} {value[key]} beside {other} {value[other]} is not supported")


def _sliding(pattern: Any) -> dict[str, Any]:
    """Which layers see just a window: every layer said, or one number for all."""
    if isinstance(pattern, list):
        return {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern]}
    return {} if pattern is None else {"sliding_window_pattern": pattern}


def _rope(value: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "rope.dimension_count" in value:
        head_dim = value.get("attention.key_length") or value["embedding_length"] // value["attention.head_count"]
        found["partial_rotary_factor"] = value["rope.dimension_count"] / head_dim
    kind = value.get("rope.scaling.type", "none")
    if kind != "none":
        scaling = {field: value[key] for key, field in _SCALING_FIELDS.items() if key in value}
        found["rope_scaling"] = {"rope_type": kind, **scaling}
    return found


def _told_by_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    }
    if "token_embd.weight" in shapes:
        found["vocab_size"] = shapes["token_embd.weight"][0]
    return found
