"""Tokenizers out of a folder: tokenizer.json and the files that may stand beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from springtide.core.errors import InvalidRequest, SetupError
from springtide.core.request import Message
from springtide.core.store import ModelFiles
from springtide.text.output import OutputText
from springtide.text.tokenizer import Tokenizer
from tests.text.conftest import byte_alphabet

WORDS = ["<unk>", "<s>", "</s>", "<|end|>", "\u2581", "a", "b", "\u2581a", "\u2581b"]


def byte_level() -> Backend:
    backend = Backend(models.BPE(vocab={token: id for id, token in enumerate(byte_alphabet())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<|end|>")])
    return backend


def metaspace(scheme: str) -> Backend:
    vocabulary = {token: id for id, token in enumerate(WORDS)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[("\u2581", "a"), ("\u2581", "b")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>", "<|end|>")])
    return backend


@pytest.fixture
def load(tmp_path) -> Callable[..., Tokenizer]:
    def load(backend: Backend | None = None, **files: Any) -> Tokenizer:
        """A tokenizer from a folder with these files (a name without its ".json", or with "_jinja" for ".jinja")."""
        (backend or byte_level()).save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            if name.endswith("_jinja"):
                (tmp_path / f"{name.removesuffix('_jinja')}.jinja").write_text(content)
            else:
                (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return Tokenizer.load(folder(tmp_path))

    return load


def folder(path: Path) -> ModelFiles:
    return ModelFiles("m", str(path), path, "safetensors", "sha256:")


def test_a_bare_tokenizer_json_is_enough_for_text(load):
    tokenizer = load()
    assert tokenizer.decode(tokenizer.encode("h\u00e9 \u65e5")) == "h\u00e9 \u65e5"
    assert (tokenizer.bos_id, tokenizer.stop_ids, tokenizer.chat_template) == (None, (), None)
    assert tokenizer.vocab_size == 259


def test_named_tokens_come_as_text_or_as_objects(load):
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    tokenizer = load(tokenizer_config=config)
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (256, (257,))


def test_named_tokens_may_stand_in_a_map_of_their_own(load):
    assert load(special_tokens_map={"bos_token": "<s>"}, tokenizer_config={"eos_token": "</s>"}).bos_id == 256


def test_a_named_token_is_a_control_token_even_if_the_vocabulary_does_not_say_so(load):
    tokenizer = load(tokenizer_config={"eos_token": "a"})
    assert tokenizer.special_tokens["a"] == tokenizer.stop_ids[0]


@pytest.mark.parametrize(("ids", "expected"), [(257, (257,)), ([258, 257], (258, 257)), ([258], (258, 257))])
def test_an_answer_ends_where_the_generation_config_says_or_the_tokenizer(load, ids, expected):
    tokenizer = load(tokenizer_config={"eos_token": "</s>"}, generation_config={"eos_token_id": ids})
    assert tokenizer.stop_ids == expected


def test_the_models_config_says_it_where_there_is_no_generation_config(load):
    assert load(config={"eos_token_id": 258}).stop_ids == (258,)


def test_a_beginning_token_by_flag(load):
    config = {"bos_token": "<s>"}
    assert load(tokenizer_config={**config, "add_bos_token": True}).encode("a") == [256, ord("a")]
    assert load(tokenizer_config={**config, "add_bos_token": False}).encode("a") == [ord("a")]
    assert load(tokenizer_config=config).encode("a") == [ord("a")]


def test_a_beginning_token_by_post_processor(load):
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer = load(backend, tokenizer_config={"bos_token": "<s>"})
    assert tokenizer.encode("a") == [256, ord("a")]
    assert tokenizer.encode("a", add_bos=False) == [ord("a")]


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"chat_template": "{{ messages[0].content }}!"}},
        {
            "tokenizer_config": {
                "chat_template": [
                    {"name": "rag", "template": "no"},
                    {"name": "default", "template": "{{ messages[0].content }}!"},
                ]
            }
        },
        {"tokenizer_config": {"chat_template": "no"}, "chat_template_jinja": "{{ messages[0].content }}!"},
    ],
)
def test_the_chat_template_is_found_wherever_it_stands(load, files):
    assert load(**files).render_chat([Message("user", "hi")]) == list(b"hi!")


def test_truncation_and_padding_of_training_are_off(load):
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=10)
    assert load(backend).encode("abc") == list(b"abc")


def test_white_space_that_a_control_token_eats(load):
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<|eat|>", special=True, lstrip=True, rstrip=True)])
    tokenizer = load(backend, tokenizer_config={"chat_template": "a <|eat|> {{ messages[0].content }}"})
    assert tokenizer.render_chat([Message("user", "\n b ")]) == [ord("a"), 259, *b"b "]


@pytest.mark.parametrize(
    ("scheme", "middle", "text"), [("first", "b", "a b"), ("always", "\u2581b", "a b"), ("never", "b", "a b")]
)
def test_the_space_before_a_text_after_a_control_token(load, scheme, middle, text):
    tokenizer = load(
        metaspace(scheme),
        tokenizer_config={"chat_template": "{{ messages[0].content }}<|end|>{{ messages[1].content }}"},
    )
    ids = tokenizer.render_chat([Message("user", "a"), Message("user", "b")])
    assert [WORDS[id] for id in ids] == ["a" if scheme == "never" else "\u2581a", "<|end|>", middle]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    output = OutputText(tokenizer)
    assert output.push(tokenizer.encode(text)) == text


def test_a_folder_without_a_tokenizer_is_a_setup_error(tmp_path):
    with pytest.raises(SetupError, match=r"has no tokenizer\.json \(it works for prompts of token ids alone\)"):
        Tokenizer.load(folder(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_broken_file_is_named(tmp_path, name):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text('{"half": ')
    with pytest.raises(SetupError, match=rf"{name} can't be read"):
        Tokenizer.load(folder(tmp_path))


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (decoders.WordPiece(), "decoder is not supported: WordPiece"),
        (None, "decoder is not supported: none"),
        (decoders.Replace(Regex("x"), " "), "regular expression"),
    ],
)
def test_a_decoder_without_bytes_for_each_token_is_refused(load, decoder, message):
    backend = byte_level()
    if decoder is not None:
        backend.decoder = decoder
    else:
        backend = Backend(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(SetupError, match=message):
        load(backend)


def test_a_normalizer_of_the_model_is_kept(load):
    backend = byte_level()
    backend.normalizer = normalizers.NFC()
    assert load(backend).encode("e\u0301") == list("\u00e9".encode())


def test_chat_without_a_template_is_refused(load):
    with pytest.raises(InvalidRequest, match="has no chat template"):
        load().render_chat([Message("user", "x")])
