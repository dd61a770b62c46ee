"""Model files that are whole load; files that are not end in one clear sentence."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from springtide.core.errors import SetupError
from springtide.core.store import ModelFiles
from springtide.engine.models.config import RopeScaling
from springtide.engine.models.registry import load_model
from springtide.engine.weights.gguf import GGUFFile
from springtide.engine.weights.safetensors import SafetensorsFolder, read_config
from tests.engine.checkpoints import files_of, loaded, saved, tiny_llama, write_gguf


def refusal(files: ModelFiles) -> str:
    with pytest.raises(SetupError) as caught:
        loaded(files)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tiny_llama(), tmp_path / "model").path


@pytest.fixture(scope="module")
def whole_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_llama(), tmp_path_factory.mktemp("gguf") / "tiny.gguf", "Q8_0").path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


# --- safetensors ---


def test_a_folder_is_read_by_name(folder: Path) -> None:
    reader = SafetensorsFolder(folder)
    expected = tiny_llama().state_dict()
    assert set(reader.shapes) == set(expected)
    for name, shape in reader.shapes.items():
        out = torch.empty(shape)
        reader.read(name, out)
        assert torch.equal(out, expected[name])


def test_an_unsupported_architecture_is_refused_by_name(folder: Path) -> None:
    edit_config(folder, architectures=["MambaForCausalLM"])
    assert "MambaForCausalLM is not supported (supported: LlamaForCausalLM)" in refusal(files_of(folder, "safetensors"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
        ({"quantization_config": "gptq"}, "not a model configuration"),
        ({"hidden_size": math.inf}, "not a model configuration"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised with 'gptq'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2}}, "rope scaling 'yarn'"),
        ({"num_hidden_layers": None}, "not a model configuration"),
        ({"architectures": []}, "not a model configuration"),
        ({"num_attention_heads": 0}, "0 heads can't share"),
        ({"num_hidden_layers": 10**9}, "out of all reason"),
        ({"num_key_value_heads": 3}, "4 heads can't share 3 kv heads"),
        ({"hidden_size": 128}, "has shape"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2."),
        ({"num_hidden_layers": 1}, "no place for"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folder: Path, changes: dict[str, Any], expected: str) -> None:
    edit_config(folder, **changes)
    assert expected in refusal(files_of(folder, "safetensors"))


def test_rope_of_older_configurations_is_understood(folder: Path) -> None:
    edit_config(folder, rope_parameters=None, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    config = read_config(folder)
    assert (config.rope_theta, config.rope_scaling) == (5e5, RopeScaling("linear", 2.0))


def test_missing_extra_and_mis_shaped_tensors_are_named(folder: Path) -> None:
    files = files_of(folder, "safetensors")
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lacks model.layers.1.mlp.up_proj.weight" in refusal(files)

    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(96, 65)}))
    assert "has shape [96, 65], expected [96, 64]" in refusal(files)

    edit_tensors(
        folder,
        lambda tensors: tensors.update(
            {"model.layers.1.mlp.up_proj.weight": torch.zeros(96, 64), "model.vision.weight": torch.zeros(2)}
        ),
    )
    assert "no place for: model.vision.weight" in refusal(files)


def test_a_shared_matrix_stored_twice_and_old_tables_are_no_surprise(tmp_path: Path) -> None:
    folder = saved(tiny_llama(tie_word_embeddings=True), tmp_path).path
    edit_tensors(
        folder,
        lambda tensors: tensors.update(
            {
                "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
            }
        ),
    )
    loaded(files_of(folder, "safetensors"))


@pytest.mark.parametrize("keep", [0, 4, 200, 20_000])
def test_a_cut_safetensors_file_is_refused(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "not a whole safetensors file" in refusal(files_of(folder, "safetensors"))


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path, max_shard_size="60KB").path
    files = files_of(folder, "safetensors")
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()

    shard = min(folder.glob("model-*.safetensors"))
    shard.rename(folder / "elsewhere")
    assert f"{shard} is missing" in refusal(files)
    index.write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    assert "points outside its folder" in refusal(files)
    index.write_text('{"weight_map": 3}')
    assert "no weight_map" in refusal(files)
    index.write_text(whole[:50])
    assert "can't be read" in refusal(files)
    index.unlink()
    assert "holds neither model.safetensors nor" in refusal(files)
    (folder / "config.json").write_text("[]")
    assert "not a JSON object" in refusal(files)
    (folder / "config.json").unlink()
    assert "config.json is missing" in refusal(files)


# --- GGUF ---


def test_a_gguf_file_is_read_by_hugging_face_names(tmp_path: Path) -> None:
    model = tiny_llama()
    file = GGUFFile(write_gguf(model, tmp_path / "tiny.gguf").path)
    expected = model.state_dict()
    assert set(file.shapes) == set(expected)
    for name, shape in file.shapes.items():
        out = torch.empty(shape)
        file.read(name, out)
        assert torch.equal(out, expected[name]), name


@pytest.mark.parametrize("keep", [0, 3, 10, 30, 1000, 5000, -1])
def test_a_cut_gguf_file_is_refused(whole_gguf: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole_gguf.read_bytes()[:keep])
    message = refusal(files_of(path, "gguf"))
    assert "not a whole GGUF file" in message or "cut short" in message or "can't be read" in message


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 8000), value=st.integers(0, 255))
def test_any_broken_byte_of_a_head_is_survived(whole_gguf: Path, tmp_path: Path, position: int, value: int) -> None:
    data = bytearray(whole_gguf.read_bytes())
    data[position] = value
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    try:
        loaded(files_of(path, "gguf"))
    except SetupError as error:
        assert str(path) in str(error) or "not supported" in str(error)


def test_other_gguf_architectures_are_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_tensor("a.weight", np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refusal(files_of(tmp_path / "other.gguf", "gguf"))
    assert "'mamba', which is not supported (supported in GGUF: llama)" in message


def test_a_tensor_type_that_cannot_be_read_is_named(whole_gguf: Path, tmp_path: Path) -> None:
    data = whole_gguf.read_bytes()
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8  # dimensions, then their sizes
    assert struct.unpack_from("<I", data, at) == (gguf.GGMLQuantizationType.Q8_0,)
    path = tmp_path / "integers.gguf"
    path.write_bytes(data[:at] + struct.pack("<I", gguf.GGMLQuantizationType.I8) + data[at + 4 :])
    assert "is of type I8, which can't be read" in refusal(files_of(path, "gguf"))


@pytest.mark.model
def test_the_default_model_has_the_sizes_it_is_known_for(default_model: ModelFiles) -> None:
    model, config = load_model(default_model, torch.bfloat16, torch.device("cpu"))
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.vocab_size, config.context_length, config.rope_theta) == (49152, 8192, 100_000.0)
    assert model.config is config
