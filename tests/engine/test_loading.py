"""A model takes the memory that was said beforehand, once, and is refused before it is read where that is not free."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from springtide.core.errors import SetupError
from springtide.core.store import ModelFiles, ModelFormat
from springtide.engine import loading, machine
from springtide.engine.config import EngineConfig
from springtide.engine.kv import block_bytes
from springtide.engine.llm_engine import LLMEngine
from springtide.engine.loading import load_runner, plan_memory
from springtide.engine.models.registry import open_checkpoint
from tests.engine.checkpoints import files_of, saved, tiny_llama

MB = 1_000_000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return saved(tiny_llama(), tmp_path_factory.mktemp("tiny"))


def told_while_loading(files: ModelFiles, **options: object) -> list[tuple[str, int, int | None]]:
    told: list[tuple[str, int, int | None]] = []
    config = EngineConfig.from_options({"dtype": "float32", "num_blocks": 4, **options})
    load_runner(files, config, lambda *step: told.append(step))
    return told


def test_what_it_takes_is_told_first_and_then_how_far_it_is(tiny: ModelFiles, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "springtide"):
        (first, *rest) = told_while_loading(tiny)
    assert first[0].startswith("the model needs 0.") and "MB and its KV memory 0.0 MB; " in first[0]
    assert first[0] in caplog.text
    in_all = open_checkpoint(tiny).weight_bytes(torch.float32)
    assert {(what, total) for what, _, total in rest} == {("loading the weights", in_all)}
    done = [step[1] for step in rest]
    assert done == sorted(done) and done[-1] == in_all
    assert len(done) == len(open_checkpoint(tiny).reader.shapes) + 1


def test_skipped_tensors_do_not_leave_the_bar_short_of_its_end(tmp_path: Path) -> None:
    files = saved(tiny_llama(tie_word_embeddings=True), tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    _, done, total = told_while_loading(files)[-1]
    assert done == total


# --- what does not fit ---


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"num_blocks": 10**9}, "lower num_blocks or kv_memory"),
        ({"kv_memory": 10**13, "max_num_seqs": 10**9}, "lower num_blocks or kv_memory"),
    ],
)
def test_more_kv_memory_than_is_free_is_refused_with_all_numbers(
    tiny: ModelFiles, options: dict[str, int], hint: str
) -> None:
    told: list[str] = []
    config = EngineConfig.from_options({"dtype": "float32", **options})
    with pytest.raises(SetupError) as caught:
        LLMEngine.from_files(tiny, config, progress=lambda what, done, total: told.append(what))
    words = r"the model needs 0\.\d MB and its KV memory [\d,]{3,}\.\d MB, but only [\d,.]+ MB are free"
    assert caught.match(words) and hint in str(caught.value)
    assert told == ["loading the model"], "something was read"


def test_weights_that_do_not_fit_are_refused_with_all_numbers(tiny: ModelFiles) -> None:
    config = open_checkpoint(tiny).config
    for dtype, hint in ((torch.float32, "smaller model, or dtype=bfloat16"), (torch.bfloat16, "a smaller model")):
        with pytest.raises(SetupError) as caught:
            plan_memory(EngineConfig(), config, dtype, weights=5000 * MB, available=4000 * MB)
        assert str(caught.value).endswith(f"{hint})")
        assert "the model needs 5,000.0 MB and its KV memory 0.0 MB, but only 4,000.0 MB are free" in str(caught.value)


def test_nothing_is_read_of_weights_that_do_not_fit(tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "available_memory", lambda: 1000)
    told: list[str] = []
    with pytest.raises(SetupError, match=r"the model needs 0\.\d MB and its KV memory 0\.0 MB, but only 0\.0 MB"):
        load_runner(tiny, EngineConfig(), lambda what, done, total: told.append(what))
    assert told == []


def test_the_page_table_counts(tiny: ModelFiles) -> None:
    """With many seats and a long context it takes more than the pages that it points to."""
    config = open_checkpoint(tiny).config
    block = block_bytes(config.num_layers, config.num_kv_heads, config.head_dim, torch.float32)
    many = EngineConfig(max_num_seqs=100_000, num_blocks=16)
    plan = plan_memory(many, config, torch.float32, weights=0, available=10**12)
    pages = min(16, config.context_length // 16)
    assert plan.kv == 16 * block + 100_000 * config.num_layers * config.num_kv_heads * pages * 4
    with pytest.raises(SetupError, match="lower num_blocks or kv_memory, or max_num_seqs"):
        plan_memory(many, config, torch.float32, weights=0, available=plan.kv - 1)


def test_a_containers_limit_counts_and_files_in_its_cache_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text("9000000\n")
    (tmp_path / "memory.current").write_text("8000000\n")
    (tmp_path / "memory.stat").write_text("anon 500\nactive_file 3000000\ninactive_file 2000000\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.available_memory() == 6_000_000
    (tmp_path / "memory.current").write_text("99000000\n")
    assert machine.available_memory() == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_memory() > 6_000_000


@given(
    available=st.integers(0, 10**10),
    weights=st.integers(0, 10**10),
    seats=st.integers(1, 1000),
    kv_memory=st.none() | st.integers(1, 10**10),
    num_blocks=st.none() | st.integers(1, 10**7),
)
def test_a_plan_fits_or_there_is_none(
    tiny: ModelFiles, available: int, weights: int, seats: int, kv_memory: int | None, num_blocks: int | None
) -> None:
    config = open_checkpoint(tiny).config
    options = EngineConfig(max_num_seqs=seats, kv_memory=kv_memory, num_blocks=num_blocks)
    try:
        plan = plan_memory(options, config, torch.float32, weights=weights, available=available)
    except SetupError:
        return
    assert plan.num_blocks >= 1 and plan.weights + plan.kv <= available
    assert num_blocks in (None, plan.num_blocks)


# --- two copies ---

VOCAB, HIDDEN, INNER = 9_000, 2048, 4096

_GROWTH = """
import sys, torch
from pathlib import Path
from springtide.core.store import ModelFiles
from springtide.engine.models.registry import open_checkpoint

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

torch.set_num_threads(1)
torch.zeros(64).bfloat16() + 1  # what torch itself takes
checkpoint = open_checkpoint(ModelFiles("big", "", Path(sys.argv[1]), sys.argv[2], ""))
before = status("VmRSS")
model = checkpoint.load(torch.bfloat16, torch.device("cpu"))
print(checkpoint.weight_bytes(torch.bfloat16), status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")
@pytest.mark.parametrize("format", ["safetensors", "gguf"])
def test_loading_never_holds_two_copies(tmp_path: Path, format: ModelFormat) -> None:
    """120 MB of weights, in a process of their own: what it grows by at most is little more than that."""
    files = _big_safetensors(tmp_path) if format == "safetensors" else _big_gguf(tmp_path / "big.gguf")
    command = [sys.executable, "-c", _GROWTH, str(files.path), format]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    size, growth = map(int, output.split())
    assert size > 110 * MB
    assert growth < size + 40 * MB  # a few rows at once, as float32 and in between


def _big_tensors() -> dict[str, torch.Tensor]:
    """A Llama of one layer, all of whose matrices are large."""
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN)}
    shapes |= {"self_attn.v_proj": (HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    shapes |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
    shapes |= {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    named = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    named |= {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    return {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in named.items()}


def _big_safetensors(folder: Path) -> ModelFiles:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    safetensors.torch.save_file(_big_tensors(), folder / "model.safetensors")
    return files_of(folder, "safetensors")


def _big_gguf(path: Path) -> ModelFiles:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(1)
    writer.add_context_length(2048)
    writer.add_head_count(16)
    writer.add_layer_norm_rms_eps(1e-6)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    q8_0, random = gguf.GGMLQuantizationType.Q8_0, np.random.default_rng(0)
    for name, tensor in _big_tensors().items():
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None
        if tensor.ndim == 1:
            writer.add_tensor(found, tensor.float().numpy())
        else:
            packed = random.integers(0, 256, (tensor.shape[0], tensor.shape[1] // 32 * 34), dtype=np.uint8)
            writer.add_tensor(found, packed, raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return files_of(path, "gguf")
