"""GGUF files as families read them: every tensor type, names, experts, and the head as a config.json would say it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from springtide.core.errors import SetupError
from springtide.engine.weights.gguf import GGUFFile, GGUFNames
from tests.engine.ggml_blocks import BLOCKS

Type = gguf.GGMLQuantizationType


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    type: Type | None = None,
    architecture: str = "llama",
    entries: Callable[[gguf.GGUFWriter], Any] = lambda writer: None,
) -> Path:
    """A file with these tensors; packed ones are uint8 of a `type`."""
    writer = gguf.GGUFWriter(path, architecture)
    entries(writer)
    for name, values in tensors.items():
        writer.add_tensor(name, values, raw_dtype=type if values.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(file: GGUFFile, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full(file.shapes[name], torch.nan, dtype=dtype)
    file.read(name, out)
    return out


def names_of(*, architecture: str = "llama", **fields: Any) -> GGUFNames:
    return GGUFNames(architecture, **fields)


# --- tensor types ---


def random_blocks(type: str, rows: int, blocks: int) -> np.ndarray:
    """Random bytes [rows, blocks * size] whose scales are numbers of a usual size."""
    layout, random = BLOCKS[type], np.random.default_rng(sorted(BLOCKS).index(type))
    packed = random.integers(0, 256, (rows, blocks, layout.size), dtype=np.uint8)
    for at in layout.halves:
        scales = random.normal(size=(rows, blocks, 1)).astype(np.float16)
        packed[..., at : at + 2] = scales.view(np.uint8)
    if type == "MXFP4":
        packed[..., 0] = random.integers(110, 140, (rows, blocks))
    return packed.reshape(rows, -1)


@pytest.mark.parametrize("type", BLOCKS)
def test_a_block_means_what_its_layout_says(tmp_path: Path, type: str) -> None:
    packed = random_blocks(type, rows=3, blocks=2)
    layout = BLOCKS[type]
    expected = [
        [value for start in range(0, len(row), layout.size) for value in layout.decode(row[start:][: layout.size])]
        for row in map(bytes, packed)
    ]
    file = GGUFFile(write(tmp_path / "a.gguf", {"a.weight": packed}, type=Type[type]))
    np.testing.assert_allclose(read(file, "a.weight").numpy(), np.array(expected), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("type", sorted(set(gguf.quants._type_traits) | {Type.F16, Type.F32}))
def test_every_type_that_can_be_unpacked_is_read_whole_and_in_order(tmp_path: Path, type: Type) -> None:
    """More rows than are unpacked at once. What a block means is the test above; of the types that are made of large
    tables it is the `gguf` package's word."""
    values_per_block, size = gguf.GGML_QUANT_SIZES[type]
    width, rows = (4 * values_per_block, 1100) if values_per_block > 1 else (1024, 1100)
    packed = np.random.default_rng(int(type)).integers(0, 256, (rows, width // values_per_block * size), dtype=np.uint8)
    file = GGUFFile(write(tmp_path / "a.gguf", {"a.weight": packed}, type=type))
    with np.errstate(all="ignore"):
        typed = packed.view({Type.F32: np.float32, Type.F16: np.float16}.get(type, np.uint8))
        expected = gguf.quants.dequantize(typed, type)
    np.testing.assert_array_equal(read(file, "a.weight").numpy(), expected)
    rounded = read(file, "a.weight", torch.bfloat16)
    np.testing.assert_array_equal(rounded.float().numpy(), torch.tensor(expected).bfloat16().float().numpy())


# --- names ---


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_names_are_ggufs_until_a_family_has_told_its_own(tmp_path: Path) -> None:
    tensors = {
        "token_embd.weight": weights(4, 8),
        "blk.1.attn_norm.weight": weights(8),
        "blk.1.post_ffw_norm.weight": weights(8),
        "blk.1.attn_q_norm.weight": weights(4),
        "blk.1.strange.weight": weights(8),
    }
    file = GGUFFile(write(tmp_path / "a.gguf", tensors, architecture="gemma3"))
    assert set(file.shapes) == set(tensors)
    file.use(names_of(architecture="gemma3", extra={"post_ffw_norm": "post_feedforward_layernorm"}))
    assert set(file.shapes) == {
        "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_feedforward_layernorm.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "blk.1.strange.weight",
    }


def test_what_the_file_added_to_norms_is_taken_off_again(tmp_path: Path) -> None:
    norm, projection = weights(8), weights(8, 8)
    tensors = {"output_norm.weight": norm + 1, "blk.0.attn_k_norm.weight": norm + 1, "blk.0.ffn_up.weight": projection}
    file = GGUFFile(write(tmp_path / "a.gguf", tensors, architecture="gemma3"))
    file.use(names_of(architecture="gemma3", norm_offset=1.0))
    for name in ("model.norm.weight", "model.layers.0.self_attn.k_norm.weight"):
        np.testing.assert_array_equal(read(file, name).numpy(), (norm + 1) - 1)
    np.testing.assert_array_equal(read(file, "model.layers.0.mlp.up_proj.weight").numpy(), projection)


@pytest.mark.parametrize(
    ("type", "values"), [(None, weights(3, 4, 32)), (Type.Q8_0, gguf.quants.quantize(weights(3, 4, 32), Type.Q8_0))]
)
def test_each_expert_is_a_tensor_of_its_own(tmp_path: Path, type: Type | None, values: np.ndarray) -> None:
    bias = weights(3, 4, seed=1)
    tensors = {
        "blk.0.ffn_gate_exps.weight": values,
        "blk.0.ffn_gate_exps.bias": bias,
        "blk.0.ffn_gate_inp.weight": bias,
    }
    path = write(tmp_path / "a.gguf", tensors, type=type, architecture="qwen3moe")
    file = GGUFFile(path)
    file.use(names_of(architecture="qwen3moe"))
    of = "model.layers.0.mlp.experts"
    expected = values if type is None else gguf.quants.dequantize(values, type)
    for expert in range(3):
        assert file.shapes[f"{of}.{expert}.gate_proj.weight"] == (4, 32)
        np.testing.assert_array_equal(read(file, f"{of}.{expert}.gate_proj.weight").numpy(), expected[expert])
        np.testing.assert_array_equal(read(file, f"{of}.{expert}.gate_proj.bias").numpy(), bias[expert])
    assert file.shapes["model.layers.0.mlp.gate.weight"] == (3, 4)

    file = GGUFFile(path)
    file.use(names_of(extra={"ffn_gate_exps": "block_sparse_moe.experts.{e}.w1"}))
    np.testing.assert_array_equal(
        read(file, "model.layers.0.block_sparse_moe.experts.2.w1.weight").numpy(), expected[2]
    )


def test_rotated_heads_are_put_back_in_order(tmp_path: Path) -> None:
    """Two heads of four rows: a file has the pairs (0, 2) and (1, 3) side by side."""
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    q, bias = weights(8, 6), weights(8)
    tensors = {"blk.0.attn_q.weight": q[order], "blk.0.attn_q.bias": bias[order], "blk.0.attn_v.weight": q[order]}

    def entries(writer: gguf.GGUFWriter) -> None:
        writer.add_head_count(2)

    file = GGUFFile(write(tmp_path / "a.gguf", tensors, entries=entries))
    file.use(names_of(rotated_pairs=True))
    within = "model.layers.0.self_attn"
    np.testing.assert_array_equal(read(file, f"{within}.q_proj.weight").numpy(), q)
    np.testing.assert_array_equal(read(file, f"{within}.q_proj.bias").numpy(), bias)
    np.testing.assert_array_equal(read(file, f"{within}.v_proj.weight").numpy(), q[order])


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_do_not_fit_their_rows_are_refused(tmp_path: Path, heads: int) -> None:
    path = write(tmp_path / "a.gguf", {"blk.0.attn_q.weight": weights(8, 6)}, entries=lambda w: w.add_head_count(heads))
    with pytest.raises(SetupError, match=r"describes no model that can be: .* heads in 8 rows"):
        GGUFFile(path).use(names_of(rotated_pairs=True))


# --- the head ---


def head(tmp_path: Path, architecture: str = "llama", **entries: Any) -> dict[str, Any]:
    """What a file with these entries says, by names with a double underscore for each dot."""

    def add(writer: gguf.GGUFWriter) -> None:
        for name, value in entries.items():
            key = f"{architecture}.{name.replace('__', '.')}"
            if isinstance(value, list):
                writer.add_array(key, value)
            else:
                adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
                adders.get(type(value), writer.add_string)(key, value)

    path = write(tmp_path / "a.gguf", {"token_embd.weight": weights(40, 8)}, architecture=architecture, entries=add)
    return GGUFFile(path).raw_config()


def test_a_head_says_what_a_config_would(tmp_path: Path) -> None:
    raw = head(
        tmp_path,
        "qwen3moe",
        embedding_length=8,
        block_count=2,
        feed_forward_length=16,
        context_length=512,
        attention__head_count=4,
        attention__head_count_kv=[2, 2],
        attention__key_length=32,
        attention__value_length=32,
        attention__layer_norm_rms_epsilon=0.5,
        attention__sliding_window=64,
        rope__freq_base=1e6,
        rope__dimension_count=16,
        rope__scaling__type="yarn",
        rope__scaling__factor=4.0,
        rope__scaling__original_context_length=128,
        expert_count=8,
        expert_used_count=2,
        expert_feed_forward_length=24,
        expert_gating_func=1,
    )
    assert raw == {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 0.5,
        "sliding_window": 64,
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        "num_local_experts": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": 40,
    }


def test_which_layers_slide_is_told_for_each_or_by_one_number(tmp_path: Path) -> None:
    raw = head(tmp_path, "gemma3", attention__sliding_window_pattern=[True, False])
    assert raw["layer_types"] == ["sliding_attention", "full_attention"]
    assert head(tmp_path, "gemma3", attention__sliding_window_pattern=6)["sliding_window_pattern"] == 6


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"logit_scale": 0.5}, "logit_scale 0.5 is not supported"),
        ({"expert_shared_count": 1}, "expert_shared_count 1 is not supported"),
        ({"feed_forward_length": [16, 32]}, "feed_forward_length differs from layer to layer"),
        ({"attention__key_length": 8, "attention__value_length": 4}, "attention.value_length 4 beside"),
        ({"rope__dimension_count": 8, "embedding_length": 8, "attention__head_count": 0}, "describes no model"),
        ({"rope__dimension_count": 8}, "lacks embedding_length"),
    ],
)
def test_an_entry_that_would_change_the_arithmetic_unseen_is_refused(
    tmp_path: Path, entries: dict[str, Any], words: str
) -> None:
    with pytest.raises(SetupError, match=re.escape(words)):
        head(tmp_path, **entries)


def test_what_files_leave_unsaid_is_implied_and_what_they_say_wins(tmp_path: Path) -> None:
    def entries(writer: gguf.GGUFWriter) -> None:
        writer.add_context_length(512)

    file = GGUFFile(write(tmp_path / "a.gguf", {"a.weight": weights(2, 2)}, entries=entries))
    raw = file.raw_config({"norm_topk_prob": True, "max_position_embeddings": 1})
    assert (raw["norm_topk_prob"], raw["max_position_embeddings"]) == (True, 512)


def test_one_word_may_mean_a_model_with_and_without_experts(tmp_path: Path) -> None:
    plain = GGUFFile(write(tmp_path / "a.gguf", {"a.weight": weights(2, 2)}))
    mixture = GGUFFile(write(tmp_path / "b.gguf", {"a.weight": weights(2, 2)}, entries=lambda w: w.add_expert_count(8)))
    assert (plain.fits(names_of()), plain.fits(names_of(mixture=True))) == (True, False)
    assert (mixture.fits(names_of()), mixture.fits(names_of(mixture=True))) == (False, True)
    assert not plain.fits(names_of(architecture="qwen2"))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (lambda writer: writer.add_type("adapter"), r"is a LoRA adapter, which is not supported \(merge it"),
        (lambda writer: writer.add_uint16("split.count", 3), r"is one of 3 parts of a model \(join them first"),
    ],
)
def test_an_adapter_and_a_part_are_refused_by_name(
    tmp_path: Path, entries: Callable[[gguf.GGUFWriter], Any], words: str
) -> None:
    path = write(tmp_path / "a.gguf", {"a.weight": weights(2, 2)}, entries=entries)
    with pytest.raises(SetupError, match=words):
        GGUFFile(path)
