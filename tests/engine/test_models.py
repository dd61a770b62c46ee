"""Our Llama computes what transformers' computes, from every kind of file it can come in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from springtide.core.store import ModelFiles
from springtide.engine.attention.reference import ReferenceAttention
from springtide.engine.attention.registry import choose_attention
from springtide.engine.inputs import ForwardInputs
from springtide.engine.weights.base import ROPE_FREQ_FACTORS, Weights
from springtide.engine.weights.gguf import GGUFFile
from tests.engine.checkpoints import all_logits, loaded, pages_for, saved, tiny_llama, write_gguf

PROMPT = np.random.default_rng(3).integers(0, 160, 70).tolist()


@torch.inference_mode()
def theirs(model: LlamaForCausalLM, prompt: list[int] = PROMPT) -> torch.Tensor:
    return model(torch.tensor([prompt])).logits[0]


def worst_error(model: LlamaForCausalLM, files: ModelFiles, **options: Any) -> float:
    return (all_logits(loaded(files), PROMPT, **options) - theirs(model)).abs().max().item()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"tie_word_embeddings": True}, id="tied embeddings"),
        pytest.param({"num_key_value_heads": 4}, id="a kv head for each head"),
        pytest.param({"num_key_value_heads": 1}, id="one kv head"),
        pytest.param({"head_dim": 24}, id="heads wider than hidden / heads"),
        pytest.param({"attention_bias": True, "mlp_bias": True}, id="biases"),
        pytest.param({"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}, id="theta"),
        pytest.param(
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}, id="linear scaling"
        ),
        pytest.param(
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10_000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
            id="llama3 scaling",
        ),
    ],
)
def test_logits_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_llama(**changes)
    files = saved(model, tmp_path)
    assert worst_error(model, files) < 1e-4
    assert worst_error(model, files, chunk=7, attention=ReferenceAttention()) < 1e-4


def test_shards_equal_one_file(tmp_path: Path) -> None:
    model = tiny_llama()
    files = saved(model, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert worst_error(model, files) < 1e-4


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
def test_gguf_in_float32_equals_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_llama(**changes)
    assert worst_error(model, write_gguf(model, tmp_path / "tiny.gguf")) < 1e-4


@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0", "Q5_0", "Q4_1", "Q4_0"])
def test_quantised_gguf_equals_transformers_with_the_rounded_weights(tmp_path: Path, type: str) -> None:
    model = tiny_llama()
    files = write_gguf(model, tmp_path / "tiny.gguf", type)
    _round_weights(model, type)
    assert worst_error(model, files) < 1e-3


def test_frequency_factors_of_a_gguf_file_stretch_the_rotation(tmp_path: Path) -> None:
    """Llama 3 in GGUF keeps its scaling as a tensor. A constant factor is linear scaling."""
    model = tiny_llama(rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0})
    factors = np.full(model.config.head_dim // 2, 4.0)
    assert worst_error(model, write_gguf(model, tmp_path / "tiny.gguf", rope_freqs=factors)) < 1e-4


def test_frequency_factors_are_kept_whole_in_bfloat16(tmp_path: Path) -> None:
    factors = np.linspace(1.0, 8.1, 8)
    files = write_gguf(tiny_llama(), tmp_path / "tiny.gguf", rope_freqs=factors)
    given = Weights(GGUFFile(files.path), torch.bfloat16, torch.device("cpu"))
    taken = given.take(ROPE_FREQ_FACTORS, 8, dtype=torch.float32)
    assert np.array_equal(taken.numpy(), factors.astype(np.float32))
    exact, half = loaded(files), loaded(files, torch.bfloat16)
    turned = [model._rotary.split(torch.ones(1, 128), torch.tensor([200]))[0] for model in (exact, half)]  # type: ignore[attr-defined]
    assert torch.equal(*turned)


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    model = tiny_llama(initializer_range=0.1)
    ours = all_logits(loaded(saved(model, tmp_path), torch.bfloat16), PROMPT, dtype=torch.bfloat16)
    similarity = torch.nn.functional.cosine_similarity(ours, theirs(model), dim=-1)
    assert similarity.min() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [1, 3, 16, 33])
def test_the_chunking_of_a_prompt_changes_no_bit(tmp_path: Path, dtype: torch.dtype, chunk: int) -> None:
    model = loaded(saved(tiny_llama(), tmp_path), dtype)
    whole = all_logits(model, PROMPT, dtype=dtype)
    assert torch.equal(all_logits(model, PROMPT, chunk=chunk, dtype=dtype), whole)


def test_a_broken_number_stays_in_its_sequence(tmp_path: Path) -> None:
    """A NaN in an embedding must reach the logits of its own sequence, where the sampler reports it, and no other."""
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.embed_tokens.weight[5] = math.nan
    model = loaded(saved(broken, tmp_path))
    pool, page_table = pages_for(model, 2, 3, torch.float32)
    inputs = ForwardInputs(
        token_ids=torch.tensor([1, 2, 3, 4, 5]),
        positions=torch.tensor([0, 1, 2, 0, 1]),
        row_seq=torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32),
        page_table=page_table,
        logit_rows=torch.tensor([2, 4]),
    )
    with torch.inference_mode():
        logits = model.logits(model.forward(inputs, pool, choose_attention("auto", model.config, torch.float32)))
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


def _round_weights(model: LlamaForCausalLM, type: str) -> None:
    """What is left of the matrices after a round trip through the block format. Blocks lie within rows, so the
    permutation of rows does not matter."""
    import gguf

    kind = gguf.GGMLQuantizationType[type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                packed = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind).copy()))
