"""GGUF files, whole and broken, and the tokenizers that are refused by name."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from springtide.core.errors import SetupError
from springtide.core.store import ModelFiles
from springtide.text.gguf_metadata import Metadata, read_head, read_metadata
from springtide.text.tokenizer import Tokenizer
from springtide.text.tokenizer_files import from_metadata

SCALARS: dict[str, tuple[GGUFValueType, Any]] = {
    "a.u8": (GGUFValueType.UINT8, 200),
    "a.i8": (GGUFValueType.INT8, -3),
    "a.u16": (GGUFValueType.UINT16, 60000),
    "a.i16": (GGUFValueType.INT16, -30000),
    "a.u32": (GGUFValueType.UINT32, 4_000_000_000),
    "a.i32": (GGUFValueType.INT32, -2_000_000_000),
    "a.u64": (GGUFValueType.UINT64, 2**63),
    "a.i64": (GGUFValueType.INT64, -(2**62)),
    "a.f32": (GGUFValueType.FLOAT32, 0.5),
    "a.f64": (GGUFValueType.FLOAT64, 0.1),
    "a.bool": (GGUFValueType.BOOL, True),
    "a.string": (GGUFValueType.STRING, "\u65e5 text"),
}


def write(path: Path, metadata: Metadata) -> Path:
    writer = GGUFWriter(path, "llama")
    for key, (type, value) in SCALARS.items():
        writer.add_key_value(key, value, type)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def files(path: Path) -> ModelFiles:
    return ModelFiles("m", "m", path, "gguf", "sha256:")


@pytest.fixture(scope="module")
def tiny_file(tiny_metadata, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_metadata)


def test_metadata_is_what_was_written(tiny_metadata, tiny_file):
    entries = read_metadata(tiny_file)
    assert {key: entries[key] for key in SCALARS} == {key: value for key, (_, value) in SCALARS.items()}
    assert {key: entries[key] for key in tiny_metadata} == tiny_metadata


def test_metadata_is_what_the_reference_reader_reads(tiny_file):
    reader = GGUFReader(tiny_file)
    read = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert read_metadata(tiny_file) == read


def test_a_tokenizer_from_a_file_is_one_from_its_metadata(tiny_file, tiny):
    text = "the stop \u00e9 <tool> <|im_end|>"
    assert Tokenizer.load(files(tiny_file)).encode(text) == tiny.encode(text)


@given(cut=st.integers(0, 10_000))
def test_a_file_that_is_cut_short_is_named(tiny_file, tmp_path_factory, cut):
    data = tiny_file.read_bytes()
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    path.write_bytes(data[: min(cut, len(data) - 1)])
    with pytest.raises(SetupError, match=r"cut\.gguf is not a whole GGUF file .*\(remove it"):
        read_metadata(path)


@given(changes=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_file_is_read_or_refused_and_nothing_else(tiny_file, tmp_path_factory, changes):
    data = bytearray(tiny_file.read_bytes())
    for at, byte in changes:
        data[at % len(data)] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(data)
    try:
        Tokenizer.load(files(path))
    except SetupError:
        pass


def test_arrays_in_arrays_without_end_are_refused(tmp_path):
    path = tmp_path / "deep.gguf"
    nested = struct.pack("<IQ", 9, 1) * 5000
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"a", 9) + nested)
    with pytest.raises(SetupError, match="not a whole GGUF file"):
        read_metadata(path)


def test_the_table_of_tensors_is_what_the_reference_reader_reads(tmp_path):
    path = tmp_path / "tensors.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_tensor("a", np.zeros((3, 5), dtype=np.float32))
    writer.add_tensor("b", np.zeros(7, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    entries, tensors = read_head(path)
    assert entries == read_metadata(path)
    assert [(t.name, t.shape, t.type, t.offset) for t in tensors] == [
        (t.name, tuple(reversed(t.shape.tolist())), int(t.tensor_type), t.data_offset) for t in GGUFReader(path).tensors
    ]


@pytest.mark.parametrize("alignment", [0, "thirty-two"])
def test_an_alignment_that_can_not_be_is_refused(tmp_path, alignment):
    with pytest.raises(SetupError, match="aligned to"):
        read_head(write(tmp_path / "odd.gguf", {"general.alignment": alignment}))


def test_a_missing_file_and_another_kind_of_file_are_named(tmp_path):
    with pytest.raises(SetupError, match=r"none\.gguf can't be read: No such file"):
        read_metadata(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("not a model at all")
    with pytest.raises(SetupError, match="does not begin with GGUF"):
        read_metadata(tmp_path / "text.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer model bert is not supported"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer model t5 is not supported"),
        ({"tokenizer.ggml.model": None}, "has no tokenizer"),
        ({"tokenizer.ggml.tokens": None}, "has no tokenizer"),
        ({"tokenizer.ggml.pre": "tekken"}, "splitting text, tekken, is not supported"),
        ({"tokenizer.ggml.merges": None}, r"incomplete: tokenizer\.ggml\.merges is missing"),
        ({"tokenizer.ggml.merges": ["x nosuchtoken"]}, "tokenizer is broken"),
        ({"tokenizer.ggml.merges": ["nospace"]}, "tokenizer is broken"),
        ({"tokenizer.ggml.merges": [1, 2]}, "tokenizer is broken"),
        ({"tokenizer.ggml.model": ["gpt2"]}, "tokenizer is broken"),
        ({"tokenizer.ggml.tokens": 7}, "tokenizer is broken"),
        ({"tokenizer.ggml.token_type": [1]}, "not one type for each token"),
    ],
)
def test_a_tokenizer_that_we_can_not_do_right_is_refused(tiny_metadata, change, message):
    metadata = {key: value for key, value in {**tiny_metadata, **change}.items() if value is not None}
    with pytest.raises(SetupError, match=message):
        from_metadata(metadata)


@pytest.mark.parametrize("id", [-1, 10**6, 0.5, "one"])
def test_a_named_token_that_there_is_not_is_none(tiny_metadata, id):
    parts = from_metadata({**tiny_metadata, "tokenizer.ggml.bos_token_id": id, "tokenizer.chat_template": 3})
    assert (parts.bos_id, parts.add_bos, parts.chat_template) == (None, False, None)


SPLITS = {
    "gpt-2": ["It", "'s", " 12345", " \u00bd\u00b2", "  ", " x", "\n\n", "\n", "y", "!?", " (", "z", ")"],
    "smollm": [
        "It",
        "'s",
        " ",
        "1",
        "2",
        "3",
        "4",
        "5",
        " ",
        "\u00bd",
        "\u00b2",
        "  ",
        " x",
        "\n\n",
        "\n",
        "y",
        "!?",
        " (",
        "z",
        ")",
    ],
    "llama-bpe": ["It", "'s", " ", "123", "45", " ", "\u00bd\u00b2", "  ", " x", "\n\n\n", "y", "!?", " (", "z", ")"],
    "qwen2": [
        "It",
        "'s",
        " ",
        "1",
        "2",
        "3",
        "4",
        "5",
        " ",
        "\u00bd",
        "\u00b2",
        "  ",
        " x",
        "\n\n\n",
        "y",
        "!?",
        " (",
        "z",
        ")",
    ],
}


@pytest.mark.parametrize("pre", SPLITS)
def test_text_is_split_before_merging_as_the_models_authors_do(tiny_metadata, pre):
    backend = from_metadata({**tiny_metadata, "tokenizer.ggml.pre": pre}).backend
    text = "It's 12345 \u00bd\u00b2   x\n\n\ny!? (z)"
    splits = [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert splits == SPLITS[pre]


def test_tokens_of_the_user_are_found_in_any_text_and_control_tokens_in_none(tiny):
    ids = tiny.encode("<tool><|im_end|>")
    assert ids[0] == tiny.vocab_size - 1
    assert tiny.special_tokens["<|im_end|>"] not in ids


@pytest.mark.parametrize(("flag", "begins"), [(True, True), (False, False), (None, False)])
def test_the_beginning_token_is_put_where_the_model_wants_it(tiny_metadata, flag, begins):
    metadata = {**tiny_metadata, **({} if flag is None else {"tokenizer.ggml.add_bos_token": flag})}
    tokenizer = Tokenizer(from_metadata(metadata))
    start = [tokenizer.bos_id] if begins else []
    assert tokenizer.encode("") == start
    assert tokenizer.encode("op") == start + tokenizer.encode("op", add_bos=False)
