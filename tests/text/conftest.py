"""A tiny tokenizer made here, the default model's, and the same as `transformers` reads it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from springtide.core.store import ModelFiles, ModelStore
from springtide.text.gguf_metadata import Metadata
from springtide.text.tokenizer import Tokenizer
from springtide.text.tokenizer_files import from_metadata

MODELS = os.environ.get("SPRINGTIDE_TEST_MODELS", str(Path.home() / ".cache" / "springtide-test" / "models"))


def byte_alphabet() -> list[str]:
    """The 256 bytes in GPT-2's alphabet, in order."""
    alphabet = ByteLevel.alphabet()
    others = iter(sorted(character for character in alphabet if ord(character) > 0xFF))
    return [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]


@pytest.fixture(scope="session")
def tiny_metadata() -> Metadata:
    """Byte-level BPE: token `i` is byte `i`; then merges, one of which joins parts of two characters; then specials."""
    alphabet = byte_alphabet()
    space, lead, trail = alphabet[0x20], alphabet[0xC3], alphabet[0xA9]
    merges = [("t", "h"), ("th", "e"), (space, "the"), ("o", "p"), ("s", "t"), ("st", "op"), (lead, trail)]
    merges.append((trail, alphabet[0xE6]))
    tokens = [*alphabet, *(left + right for left, right in merges), "<|im_start|>", "<|im_end|>", "<tool>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*[1] * (len(tokens) - 3), 3, 3, 4],
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}",
    }


@pytest.fixture(scope="session")
def tiny(tiny_metadata: Metadata) -> Tokenizer:
    return Tokenizer(from_metadata(tiny_metadata))


@pytest.fixture(scope="session")
def smollm2_files() -> ModelFiles:
    return ModelStore(Path(MODELS)).resolve("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def smollm2(smollm2_files: ModelFiles) -> Tokenizer:
    return Tokenizer.load(smollm2_files)


@pytest.fixture(scope="session")
def reference(smollm2_files: ModelFiles) -> Any:
    """The default model's tokenizer by `transformers`, with the digits split as the model's authors do: that
    conversion from GGUF leaves it out."""
    from transformers import AutoTokenizer

    path = smollm2_files.path
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(True), ByteLevel(add_prefix_space=False)])
    return tokenizer
