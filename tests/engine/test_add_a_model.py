"""The page on adding a model is true: its toy family, registered as it says, computes what plain torch does."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from springtide.core.errors import SetupError
from springtide.core.store import ModelFiles
from springtide.engine.config import EngineConfig
from springtide.engine.llm_engine import LLMEngine
from springtide.engine.models.registry import FAMILIES, open_checkpoint
from tests.engine.checkpoints import all_logits, files_of, loaded
from tests.engine.harness import random_prompt, request, run

PAGE = Path(__file__).parents[2] / "docs" / "add-a-model.md"

HIDDEN, INNER, LAYERS, VOCAB, EPS = 40, 56, 5, 90, 1e-5
HEADS, KV_HEADS, DIM, WINDOW, THETA, SCALE = 6, 3, 10, 12, 1000.0, 0.25
PROMPT = random_prompt(8, 50, below=VOCAB)

RAW = {
    "architectures": ["TideForCausalLM"],
    "head_dim": DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "logit_scale": SCALE,
    "max_position_embeddings": 128,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "sliding_window": WINDOW,
    "vocab_size": VOCAB,
}


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.fixture
def tide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's file, imported, and its line in the registry."""
    file, line = blocks()
    path = tmp_path / "tide.py"
    path.write_text(file)
    spec = importlib.util.spec_from_file_location("tide", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tide", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    for name, family in eval(f"{{{line}}}", {"tide": module}).items():
        monkeypatch.setitem(FAMILIES, name, family)
    return module


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int, mean: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3 + mean

    made = {
        "model.embed_tokens.weight": random(VOCAB, HIDDEN),
        "model.norm.weight": random(HIDDEN, mean=0.5),
        "lm_head.weight": random(VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        made |= {
            f"model.layers.{layer}.{name}.weight": tensor
            for name, tensor in {
                "input_layernorm": random(HIDDEN, mean=0.5),
                "self_attn.q_proj": random(HEADS * DIM, HIDDEN),
                "self_attn.k_proj": random(KV_HEADS * DIM, HIDDEN),
                "self_attn.v_proj": random(KV_HEADS * DIM, HIDDEN),
                "self_attn.o_proj": random(HIDDEN, HEADS * DIM),
                "mlp.gate_proj": random(INNER, HIDDEN),
                "mlp.up_proj": random(INNER, HIDDEN),
                "mlp.down_proj": random(HIDDEN, INNER),
            }.items()
        }
    return made


@pytest.fixture
def files(tmp_path: Path, tide: ModuleType, weights: dict[str, Tensor]) -> ModelFiles:
    return written(tmp_path, weights, RAW)


def written(folder: Path, weights: dict[str, Tensor], raw: dict[str, Any]) -> ModelFiles:
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    return files_of(folder, "safetensors")


def plain_torch(weights: dict[str, Tensor], token_ids: list[int]) -> Tensor:
    """Tide's arithmetic with nothing of ours: logits at every position, [tokens, vocab]."""
    x = weights["model.embed_tokens.weight"][token_ids]
    positions = torch.arange(len(token_ids))
    behind = positions[:, None] - positions[None, :]
    for layer in range(LAYERS):
        w = {name.split(f"layers.{layer}.")[-1]: tensor for name, tensor in weights.items()}
        everywhere = (layer + 1) % 4 == 0
        normed = _norm(x, w["input_layernorm.weight"])
        q, k, v = (
            (normed @ w[f"self_attn.{part}_proj.weight"].T).unflatten(-1, (-1, DIM)).transpose(0, 1) for part in "qkv"
        )
        if not everywhere:
            q, k = _turn(q, positions), _turn(k, positions)
        k, v = (each.repeat_interleave(HEADS // KV_HEADS, dim=0) for each in (k, v))
        seen = (behind >= 0) & (everywhere | (behind < WINDOW))
        shares = torch.where(seen, q @ k.transpose(1, 2) * DIM**-0.5, -torch.inf).softmax(dim=-1)
        attended = (shares @ v).transpose(0, 1).flatten(1) @ w["self_attn.o_proj.weight"].T
        gated = F.silu(normed @ w["mlp.gate_proj.weight"].T) * (normed @ w["mlp.up_proj.weight"].T)
        x = x + attended + gated @ w["mlp.down_proj.weight"].T
    return _norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T * SCALE


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight


def _turn(heads: Tensor, positions: Tensor) -> Tensor:
    angles = positions[:, None] * THETA ** (-torch.arange(0, DIM, 2) / DIM)
    first, second = heads.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def test_the_family_of_the_page_computes_what_plain_torch_does(files: ModelFiles, weights: dict[str, Tensor]) -> None:
    model = loaded(files)
    expected = plain_torch(weights, PROMPT)
    logits = all_logits(model, PROMPT)
    assert (logits - expected).abs().max() < 1e-4
    assert torch.equal(all_logits(model, PROMPT, chunk=7), logits)


def test_the_engine_serves_it(files: ModelFiles, weights: dict[str, Tensor]) -> None:
    engine = LLMEngine.from_files(files, EngineConfig(dtype="float32", num_blocks=20))
    answer = run(engine, request("a", PROMPT, max_tokens=10, temperature=0.0, ignore_eos=True))["a"].tokens
    greedy = plain_torch(weights, PROMPT + answer[:-1])[-10:].argmax(dim=-1)
    assert answer == greedy.tolist()


def test_what_the_page_refuses_is_refused(tmp_path: Path, tide: ModuleType, weights: dict[str, Tensor]) -> None:
    with pytest.raises(SetupError, match=r"tide_memory is not supported \(supported: .*TideForCausalLM"):
        open_checkpoint(written(tmp_path, weights, RAW | {"tide_memory": True}))


def test_a_family_is_a_short_file() -> None:
    """What the page promises, of every family that there is."""
    assert len(blocks()[0].splitlines()) < 150
    for module in {family.read_config.__module__ for family in FAMILIES.values()}:
        spec = importlib.util.find_spec(module)
        assert spec and spec.origin
        assert len(Path(spec.origin).read_text().splitlines()) < 150, module
