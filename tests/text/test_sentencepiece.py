"""SentencePiece models out of GGUF files: the tokens of the plain algorithm, and spaces where they belong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.core.request import Message
from springtide.text.gguf_metadata import Metadata
from springtide.text.output import OutputText
from springtide.text.tokenizer import Tokenizer
from springtide.text.tokenizer_files import from_metadata
from tests.text.spm_reference import SPACE, spm_encode

PIECES = [
    *("▁t", "he", "▁the", "in", "er", "an", "▁a", "on", "re", "at", "en", "▁an", "is", "th", "nd", "▁and", "ing"),
    *("▁w", "▁he", "ll", "lo", "hello", "▁hello", "wor", "ld", "▁world"),
]
LETTERS = sorted(set("".join(PIECES)) | set(",.!"))
TOKENS = [
    *("<unk>", "<s>", "</s>"),
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *PIECES,
    *LETTERS,
]
FIRST = 3 + 256


@pytest.fixture(scope="module")
def spm_metadata() -> Metadata:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.scores": [0.0] * FIRST + [-float(rank) for rank in range(len(TOKENS) - FIRST)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(TOKENS) - FIRST),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    }


@pytest.fixture(scope="module", params=[True, False], ids=["with a space before", "without"])
def spm(request, spm_metadata) -> tuple[Tokenizer, Metadata]:
    metadata = {**spm_metadata, "tokenizer.ggml.add_space_prefix": request.param}
    return Tokenizer(from_metadata(metadata)), metadata


TEXT = st.lists(
    st.sampled_from(
        ["the ", "hello", " world", "and", " ", "  ", "ing", ",", "\u00e9", "\u65e5", "\U0001f600", "\n", "an", "x"]
    )
).map("".join)


@given(text=TEXT)
def test_tokens_are_those_of_the_plain_algorithm_and_come_back(spm, text):
    tokenizer, metadata = spm
    ids = tokenizer.encode(text, add_bos=False)
    prefix = metadata["tokenizer.ggml.add_space_prefix"]
    assert ids == spm_encode(text, TOKENS, metadata["tokenizer.ggml.scores"], prefix=prefix)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=TEXT, cut=st.integers(0, 20))
def test_text_one_by_one_is_the_text_at_once_also_after_a_resume(spm, text, cut):
    tokenizer, _ = spm
    ids = tokenizer.encode(text, add_bos=False)
    first = OutputText(tokenizer)
    sent = "".join(first.push([id]) for id in ids[:cut])
    resumed = OutputText(tokenizer, prior_ids=ids[:cut], prior_text=sent)
    assert sent + "".join(resumed.push([id]) for id in ids[cut:]) + resumed.finish() == text


@given(ids=st.lists(st.integers(0, len(TOKENS) - 1), max_size=20))
def test_any_tokens_one_by_one_are_the_text_at_once(spm, ids):
    tokenizer, _ = spm
    output = OutputText(tokenizer)
    assert "".join(output.push([id]) for id in ids) + output.finish() == tokenizer.decode(ids)


def test_a_space_is_the_tokenizers_own_only_where_a_text_begins(spm_metadata):
    tokenizer = Tokenizer(from_metadata(spm_metadata))
    the = tokenizer.encode("the", add_bos=False)
    assert [TOKENS[id] for id in the] == [SPACE + "the"]
    assert OutputText(tokenizer).push(the) == "the"
    assert OutputText(tokenizer, continues=True).push(the) == " the"
    resumed = OutputText(tokenizer, prior_ids=tokenizer.encode("hello", add_bos=False), prior_text="hello")
    assert resumed.push(the) == " the"


def test_a_beginning_token_is_put_before_a_text(spm_metadata):
    tokenizer = Tokenizer(from_metadata(spm_metadata))
    assert tokenizer.encode("hello")[0] == 1
    assert tokenizer.encode("") == [1]


def test_a_control_token_typed_as_text_stays_text(spm_metadata):
    tokenizer = Tokenizer(from_metadata(spm_metadata))
    ids = tokenizer.encode("hello</s>", add_bos=False)
    assert 2 not in ids
    assert tokenizer.decode(ids) == "hello</s>"
    chat = tokenizer.render_chat([Message("user", "hello</s>"), Message("assistant", "world")])
    assert chat == [1, *ids, 2, *tokenizer.encode("world", add_bos=False), 2]


def test_bytes_of_a_character_that_no_token_has(spm_metadata):
    tokenizer = Tokenizer(from_metadata(spm_metadata))
    ids = tokenizer.encode("\u65e5", add_bos=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == b" \xe6\x97\xa5"
