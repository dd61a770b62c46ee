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
from springtide.engine.models.config import Rope, RopeScaling
from springtide.engine.models.registry import FAMILIES, open_checkpoint
from springtide.engine.weights.gguf import GGUFFile, GGUFNames
from springtide.engine.weights.safetensors import SafetensorsFolder
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
    message = refusal(files_of(folder, "safetensors"))
    assert "MambaForCausalLM is not supported (supported: " in message
    assert all(name in message for name in FAMILIES)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlavaForConditionalGeneration"]},
        {"architectures": ["Llama4ForCausalLM"], "vision_config": {"hidden_size": 8}},
    ],
)
def test_a_model_of_images_is_refused_by_name(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    message = refusal(files_of(folder, "safetensors"))
    assert f"the architecture {changes['architectures'][0]} is not supported: it takes more than the text" in message
    assert "LlamaForCausalLM" in message


def test_an_adapter_is_refused_by_name(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    loaded(files_of(folder, "safetensors"))  # left behind beside the model that it was merged into
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    message = refusal(files_of(folder, "safetensors"))
    assert "holds a LoRA adapter, not a model" in message
    assert "LlamaForCausalLM" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
        ({"quantization_config": "gptq"}, "not a model configuration"),
        ({"hidden_size": math.inf}, "not a model configuration"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised with 'gptq'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "longrope", "factor": 2}}, "rope scaling 'longrope'"),
        ({"num_hidden_layers": None}, "not a model configuration"),
        ({"architectures": []}, "the architecture none is not supported"),
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
    (rope, _) = [layer.rope for layer in open_checkpoint(files_of(folder, "safetensors")).config.layers]
    assert rope is not None
    assert (rope.theta, rope.scaling) == (5e5, RopeScaling("linear", 2.0))


def test_no_memory_is_taken_for_sizes_that_the_tensors_do_not_have(folder: Path) -> None:
    edit_config(folder, intermediate_size=10**12)
    assert "expected [1000000000000, 64]" in refusal(files_of(folder, "safetensors"))


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


def test_a_head_that_can_not_be_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    for line, words in [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "does not take 4 bytes"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}, "the file at"),
        ({"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}, "the file at"),
        ({"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}, "invalid literal"),
        ({"dtype": "F32", "shape": [1]}, "a tensor has no data_offsets"),
        (3, "not a whole safetensors file"),
    ]:
        head = json.dumps({"__metadata__": {}, "a": line}).encode()
        path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(8))
        message = refusal(files_of(folder, "safetensors"))
        assert "not a whole safetensors file" in message and words in message


def test_every_plain_type_is_converted(tmp_path: Path) -> None:
    """More values than are read at once, and tensors without any."""
    values = torch.randn(3, 400_000)
    tensors = {
        str(dtype): (values * 10).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool)
    }
    safetensors.torch.save_file(
        tensors | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}, tmp_path / "model.safetensors"
    )
    reader = SafetensorsFolder(tmp_path)
    for name, expected in tensors.items():
        out = torch.empty(values.shape)
        reader.read(name, out)
        assert torch.equal(out, expected.float()), name
    scalar, empty = torch.empty(()), torch.empty(0, 4)
    reader.read("scalar", scalar)
    reader.read("empty", empty)
    assert (scalar.item(), reader.shapes["empty"]) == (2.5, (0, 4))


def test_a_type_that_can_not_be_read_is_named(folder: Path) -> None:
    edit_tensors(
        folder,
        lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}),
    )
    assert "tensor model.norm.weight in" in (message := refusal(files_of(folder, "safetensors")))
    assert "can't be read: its type is F8_E4M3" in message


def mxfp4_value(blocks: np.ndarray, scales: np.ndarray, expert: int, row: int, column: int) -> float:
    """One value by the standard: OCP Microscaling Formats 1.0, E2M1 with a shared E8M0 scale."""
    byte = int(blocks[expert, row, column // 32, column % 32 // 2])
    nibble = byte >> 4 if column % 2 else byte & 15
    sign, exponent, mantissa = nibble >> 3, nibble >> 1 & 3, nibble & 1
    size = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return (-size if sign else size) * 2.0 ** (int(scales[expert, row, column // 32]) - 127)


def test_experts_in_mxfp4_are_one_tensor_each_and_read_as_values(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (2, 6, 3, 16), dtype=np.uint8)
    scales = random.integers(110, 140, (2, 6, 3), dtype=np.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": torch.tensor(blocks), f"{name}_scales": torch.tensor(scales)}
    safetensors.torch.save_file(tensors | {f"{name}_bias": torch.ones(2, 6)}, tmp_path / "model.safetensors")
    reader = SafetensorsFolder(tmp_path)
    assert reader.shapes == {name: (2, 96, 6), f"{name}_bias": (2, 6)}
    out = torch.empty(2, 96, 6)
    reader.read(name, out)
    expected = [[[mxfp4_value(blocks, scales, e, row, i) for row in range(6)] for i in range(96)] for e in range(2)]
    assert out.tolist() == expected


def test_blocks_without_their_scales_are_no_tensor(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a_blocks": torch.zeros(1, 1, 1, 16).byte()}, tmp_path / "model.safetensors")
    assert list(SafetensorsFolder(tmp_path).shapes) == ["a_blocks"]


# --- GGUF ---


def test_a_gguf_file_is_read_by_hugging_face_names(tmp_path: Path) -> None:
    model = tiny_llama()
    file = GGUFFile(write_gguf(model, tmp_path / "tiny.gguf").path)
    file.use(GGUFNames("llama", rotated_pairs=True))
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
    assert "'mamba', which is not supported (supported in GGUF: " in message
    assert "llama" in message


def test_a_tensor_type_that_cannot_be_read_is_named(whole_gguf: Path, tmp_path: Path) -> None:
    data = whole_gguf.read_bytes()
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8  # dimensions, then their sizes
    assert struct.unpack_from("<I", data, at) == (gguf.GGMLQuantizationType.Q8_0,)
    path = tmp_path / "integers.gguf"
    path.write_bytes(data[:at] + struct.pack("<I", gguf.GGMLQuantizationType.I8) + data[at + 4 :])
    assert "is of type I8, which can't be read" in refusal(files_of(path, "gguf"))


@pytest.mark.model
def test_the_default_model_has_the_sizes_it_is_known_for(default_model: ModelFiles) -> None:
    config = open_checkpoint(default_model).config
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.vocab_size, config.context_length) == (49152, 8192)
    assert {layer.rope for layer in config.layers} == {Rope(100_000.0, 64)}
