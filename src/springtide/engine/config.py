"""How an engine is set up, and nothing of what it runs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from springtide.core.errors import SetupError


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All options of an engine, with their defaults. `None` means that the engine works it out.

    dtype: of weights and KV; "auto" is bfloat16 where the processor multiplies it natively, else float32.
    max_num_seqs: sequences that may hold KV memory at once.
    max_num_batched_tokens: rows of one step; long prompts are cut into chunks of at most this.
    num_blocks, kv_memory (bytes): size of the KV pool; num_blocks wins.
    context_length: tokens of prompt and answer together, at most the model's own.
    drafter: who guesses further tokens of each sequence, which one step then checks together: "ngram" copies what
        followed the last tokens earlier in the sequence. It changes no token, only how soon it comes.
    draft_tokens: at most so many guesses for a sequence in a step.
    threads: processor cores that a step uses; by default all that this process may run on.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    num_blocks: int | None = None
    kv_memory: int | None = None
    context_length: int | None = None
    attention: Literal["auto", "reference", "numba"] = "auto"
    drafter: Literal["none", "ngram"] = "none"
    draft_tokens: int = 7
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, value in msgspec.structs.asdict(self).items():
            if isinstance(value, int) and value < 1:
                raise SetupError(f"the engine option {name} is {value}; it must be at least 1")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EngineConfig:
        """The options of a deployment, or keyword arguments, checked.

        Raises:
            SetupError: an unknown option (naming the nearest known one) or a wrong value.
        """
        known = cls.__struct_fields__
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
                raise SetupError(f"unknown engine option {key}", hint=f"did you mean {near[0]}?")
        try:
            return msgspec.convert(dict(options), cls, strict=False)
        except msgspec.ValidationError as error:
            raise SetupError(f"an engine option has a wrong value: {error}") from None
