"""The default model's tokenizer, read from its GGUF file, against what `transformers` makes of the same file."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.core.errors import InvalidRequest
from springtide.text.output import OutputText

pytestmark = pytest.mark.model

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two spaces,\ttabs\t\t, and\n\n\n   lines \r\n ",
    "def f(x: int) -> str:\n    return f'{x:>10}'  # 100% \\n\n\n\nclass A:\n\tpass\n",
    "1234567890 3.14159 1,000,000 0x1F ½ ² Ⅷ ٣٤",
    "It's we'll they'd I'M 'tis rock'n'roll",
    "日本語のテスト。中文测试，한국어 테스트",
    "😀👩‍👩‍👧‍👦 🇩🇪 e\u0301 é नमस्ते",
    "مرحبا שלום Здравствуй Γειά",
    '<div class="a">&amp;</div> {"k": [1, null]} $x^2$ ```py\nx```',
    "\x00\x01\x7f\ufeff\ufffd\u00a0\u2028",
    "a" * 1000 + " " * 1000 + "\n" * 100,
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_becomes_the_same_tokens_and_comes_back(smollm2, reference, text):
    ids = smollm2.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False)
    assert smollm2.decode(ids) == text


@given(st.text(max_size=60))
def test_any_text_becomes_the_same_tokens(smollm2, reference, text):
    ids = smollm2.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False)
    assert smollm2.decode(ids) == reference.decode(ids)  # the text, but for control characters that no token has


@given(st.lists(st.integers(0, 49151), max_size=30))
def test_any_tokens_become_the_same_text_at_once_or_one_by_one(smollm2, reference, ids):
    text = smollm2.decode(ids)
    assert text == reference.decode(ids, skip_special_tokens=True)
    output = OutputText(smollm2)
    assert "".join(output.push([id]) for id in ids) + output.finish() == text


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>"])
def test_a_control_token_typed_in_a_prompt_stays_text(smollm2, token):
    ids = smollm2.encode(f"a{token}b")
    assert smollm2.special_tokens[token] not in ids
    assert smollm2.decode(ids) == f"a{token}b"


def test_control_tokens_are_text_only_where_they_are_asked_for(smollm2):
    ids = [1, *smollm2.encode("hi"), 2]
    assert smollm2.decode(ids) == "hi"
    assert smollm2.decode(ids, skip_special=False) == "<|im_start|>hi<|im_end|>"
    assert smollm2.token_bytes(2) == b"<|im_end|>"


def test_what_the_file_says_of_the_model(smollm2):
    assert smollm2.vocab_size == 49152
    assert smollm2.stop_ids == (2, 0)  # <|im_end|>, <|endoftext|>
    assert smollm2.bos_id == 1
    assert smollm2.encode("a", add_bos=True) == smollm2.encode("a", add_bos=False)  # this model wants none


def test_ids_that_no_token_has_are_empty(smollm2):
    assert smollm2.decode([49152, 10**9]) == ""
    assert smollm2.token_bytes(49152) == b""


def test_half_a_surrogate_pair_is_refused(smollm2):
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        smollm2.encode("a\ud83d")


def test_the_file_under_another_name_is_another_tokenizer(smollm2_files, smollm2):
    again = type(smollm2).load(msgspec.structs.replace(smollm2_files, name="other"))
    assert again.encode("the same") == smollm2.encode("the same")
