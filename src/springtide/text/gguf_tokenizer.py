"""The tokenizer that a GGUF file describes, as an object of the `tokenizers` library. Knows nothing of templates.

GGUF names how text is split before merging ("pre"); the regular expressions behind the names are those of the models'
authors. A name that is not known is refused: a wrong split would only make answers a little worse, and nobody see why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import PreTokenizer

from springtide.core.errors import SetupError
from springtide.text.gguf_metadata import Metadata


class TokenType(IntEnum):
    """GGUF's `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def build_backend(metadata: Metadata) -> Backend:
    """The tokenizer of a model file.

    Raises:
        SetupError: the file has none, or one of a kind that is not supported, or an incomplete one.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or "tokenizer.ggml.tokens" not in metadata:
        raise SetupError("the model file has no tokenizer", hint="it works for prompts of token ids alone")
    build = {"gpt2": _build_byte_level, "llama": _build_sentencepiece}.get(kind)
    if build is None:
        raise SetupError(f"the tokenizer model {kind} is not supported", hint="supported: gpt2, llama")
    try:
        backend = build(metadata)
    except KeyError as error:
        raise SetupError(f"the model file's tokenizer is incomplete: {error.args[0]} is missing") from None
    _add_tokens(backend, metadata["tokenizer.ggml.tokens"], token_types(metadata))
    return backend


def token_types(metadata: Metadata) -> list[int]:
    """The `TokenType` of every token."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise SetupError("the model file's tokenizer is broken: it has not one type for each token")
    return types


def _add_tokens(backend: Backend, tokens: list[str], types: list[int]) -> None:
    """Tell which tokens are found in text as they are, before any splitting."""
    for type, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        found = [token for token, its_type in zip(tokens, types, strict=True) if its_type == type and token]
        add = backend.add_special_tokens if special else backend.add_tokens
        add([AddedToken(token, special=special, normalized=False) for token in found])


# -- byte-level BPE ------------------------------------------------------------------------------------------

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS: dict[str, Sequence[str]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), (_QWEN2,)),
}
_WHOLE_WORDS_FIRST = frozenset(("llama-bpe", "llama3", "llama-v3"))
_COMPOSED = frozenset(["qwen2"])


def _build_byte_level(metadata: Metadata) -> Backend:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _SPLITS:
        raise SetupError(
            f"the tokenizer's way of splitting text, {pre}, is not supported", hint=f"supported: {', '.join(_SPLITS)}"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    backend = _backend(
        lambda: models.BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre in _WHOLE_WORDS_FIRST,
        )
    )
    if pre in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    splits: list[PreTokenizer] = [pre_tokenizers.Split(Regex(split), "isolated") for split in _SPLITS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


# -- SentencePiece -------------------------------------------------------------------------------------------

_SPACE = "\u2581"


def _build_sentencepiece(metadata: Metadata) -> Backend:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types = token_types(metadata)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    merges = _merges(tokens, metadata["tokenizer.ggml.scores"], types)
    backend = _backend(
        lambda: models.BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=merges,
            unk_token=tokens[unknown] if unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=TokenType.BYTE in types,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[normalizers.Normalizer] = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip: list[decoders.Decoder] = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose whole has the highest score; BPE wants every such pair, best first."""
    mergeable = {
        token: id for id, token in enumerate(tokens) if types[id] in (TokenType.NORMAL, TokenType.USER_DEFINED)
    }
    ranked = []
    for whole, id in mergeable.items():
        for cut in range(1, len(whole)):
            left, right = mergeable.get(whole[:cut]), mergeable.get(whole[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[id], id, left, right))
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]


def _backend(model: Callable[[], models.Model]) -> Backend:
    try:
        return Backend(model())
    except Exception as error:  # the library raises plain Exception for a merge of tokens that there are not
        raise SetupError(f"the model file's tokenizer is broken: {error}") from None
