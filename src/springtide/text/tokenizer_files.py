"""What a model's files say about its tokenizer, whichever way they say it: GGUF metadata, or tokenizer.json and the
files beside it. Knows nothing of how it is used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from springtide.core.errors import SetupError
from springtide.core.store import ModelFiles
from springtide.text.gguf_metadata import Metadata, read_metadata
from springtide.text.gguf_tokenizer import TokenType, build_backend, token_types


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """What a tokenizer is made of. `template_tokens` are those that chat templates call by name ("bos_token")."""

    backend: Backend
    vocab_size: int
    bos_id: int | None
    add_bos: bool
    stop_ids: tuple[int, ...]
    chat_template: str | None
    template_tokens: dict[str, str]


def load_parts(files: ModelFiles) -> TokenizerParts:
    """The tokenizer of a model.

    Raises:
        SetupError: there is none, or it is broken or of a kind that is not supported.
    """
    return from_metadata(read_metadata(files.path)) if files.format == "gguf" else _from_folder(files.path)


def _unique(ids: Iterable[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(id for id in ids if id is not None))


# -- GGUF ----------------------------------------------------------------------------------------------------

# Tokens that end an answer under whatever id; files often name only one of several.
_END_TOKENS = {
    *("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"),
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endofturn|>"),
}
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_TEMPLATE_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def from_metadata(metadata: Metadata) -> TokenizerParts:
    """The tokenizer that GGUF metadata describes.

    Raises:
        SetupError: it describes none, or one that is broken or not supported.
    """
    try:
        return _from_metadata(metadata)
    except (TypeError, AttributeError, IndexError) as error:  # entries may be of any type
        raise SetupError(f"the model file's tokenizer is broken: {error}", hint="fetch the model again") from None


def _from_metadata(metadata: Metadata) -> TokenizerParts:
    backend = build_backend(metadata)
    tokens, types = metadata["tokenizer.ggml.tokens"], token_types(metadata)

    def token_id(key: str) -> int | None:
        id = metadata.get(f"tokenizer.ggml.{key}")
        return id if isinstance(id, int) and 0 <= id < len(tokens) else None

    named = {name: tokens[id] for name, key in _TEMPLATE_KEYS.items() if (id := token_id(key)) is not None}
    ends = (id for id, token in enumerate(tokens) if types[id] == TokenType.CONTROL and token in _END_TOKENS)
    bos_id = token_id("bos_token_id")
    template = metadata.get("tokenizer.chat_template")
    # Files from before the flag existed: SentencePiece models and Llama 3 begin every text with it.
    usual = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    return TokenizerParts(
        backend=backend,
        vocab_size=len(tokens),
        bos_id=bos_id,
        add_bos=bos_id is not None and metadata.get("tokenizer.ggml.add_bos_token", usual),
        stop_ids=_unique([*map(token_id, _END_KEYS), *ends]),
        chat_template=template if isinstance(template, str) else None,
        template_tokens=named,
    )


# -- a folder ------------------------------------------------------------------------------------------------


def _from_folder(folder: Path) -> TokenizerParts:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise SetupError(f"{folder} has no tokenizer.json", hint="it works for prompts of token ids alone")
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise SetupError(f"{file} can't be read: {error}", hint="fetch the model again") from None
    backend.no_truncation()
    backend.no_padding()
    config = _read_json(folder / "tokenizer_config.json")
    named = _named_tokens(_read_json(folder / "special_tokens_map.json")) | _named_tokens(config)
    known = {name: token for name, token in named.items() if backend.token_to_id(token) is not None}
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in known.values()])
    bos_id = backend.token_to_id(known["bos_token"]) if "bos_token" in known else None
    return TokenizerParts(
        backend=backend,
        vocab_size=max(backend.get_vocab_size(), 1 + max(backend.get_added_tokens_decoder(), default=-1)),
        bos_id=bos_id,
        add_bos=bos_id is not None and _wants_bos(backend, bos_id, config),
        stop_ids=_unique(
            [*_end_ids(folder), backend.token_to_id(known["eos_token"]) if "eos_token" in known else None]
        ),
        chat_template=_chat_template(folder, config),
        template_tokens=named,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} if there is no file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        raise SetupError(f"{path} can't be read: {error}", hint="fetch the model again") from None


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Named special tokens, which stand there as text or as an object with the text in it."""
    found = {}
    for name in _TEMPLATE_KEYS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            found[name] = text
    return found


def _wants_bos(backend: Backend, bos_id: int, config: dict[str, Any]) -> bool:
    flag = config.get("add_bos_token")
    if isinstance(flag, bool):
        return flag
    return backend.encode("", add_special_tokens=True).ids[:1] == [bos_id]


def _end_ids(folder: Path) -> list[int]:
    """The ids that end an answer, by the first file that names any."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if found := [id for id in ids if isinstance(id, int)]:
            return found
    return []


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template: a file of its own, or in the configuration, there perhaps the default of several."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{folder / 'chat_template.jinja'} can't be read: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
