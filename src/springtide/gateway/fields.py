"""What becomes of a request field that this gateway does not act on: refused, accepted without effect, or
unknown. One table each; nothing is dropped silently.

A field is refused if ignoring it would give the client something else than it asked for. A value that asks
for nothing (null, an empty list, the default) is never refused: clients send those unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import msgspec

from springtide.core.errors import InvalidRequest

MAX_NAMED_FIELDS = 16
MAX_NAME_LENGTH = 48

Asks = Callable[[Any], bool]


def _is_set(value: Any) -> bool:
    return bool(value)


def _is_not(*defaults: Any) -> Asks:
    return lambda value: value is not None and value not in defaults


def _is_not_plain_text(value: Any) -> bool:
    return value is not None and (not isinstance(value, Mapping) or value.get("type") != "text")


REFUSED: dict[str, Asks] = {
    "tools": _is_set,
    "tool_choice": _is_not("none", "auto"),
    "functions": _is_set,
    "function_call": _is_not("none", "auto"),
    "response_format": _is_not_plain_text,
    "structured_outputs": _is_set,
    "guided_json": _is_set,
    "guided_regex": _is_set,
    "guided_choice": _is_set,
    "guided_grammar": _is_set,
    "modalities": _is_not(["text"]),
    "audio": _is_set,
    "prediction": _is_set,
    "web_search_options": _is_not(),
    "best_of": _is_not(0, 1),
    "suffix": _is_set,
    "use_beam_search": _is_set,
    "prompt_logprobs": _is_not(),
    "prompt_embeds": _is_set,
    "chat_template": _is_set,
    "continue_final_message": _is_set,
    "include_stop_str_in_output": _is_set,
    "allowed_token_ids": _is_set,
    "bad_words": _is_set,
    "truncate_prompt_tokens": _is_not(),
}

# Bookkeeping of the client's own, or advice that changes nothing here: accepted, and not named as ignored.
WITHOUT_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)


def check_fields(fields: Mapping[str, msgspec.Raw], known: Collection[str]) -> list[str]:
    """The names among `fields` that nobody here knows.

    Raises:
        InvalidRequest: a field asks for what we can't do.
    """
    unknown = []
    for name, raw in fields.items():
        if name in known or name in WITHOUT_EFFECT:
            continue
        asks = REFUSED.get(name)
        if asks is None:
            unknown.append(name)
        elif asks(msgspec.json.decode(raw)):
            raise InvalidRequest(f"{name} is not supported", param=name, code="unsupported_parameter")
    return unknown


def name_ignored(names: Iterable[str]) -> str:
    """`names` as the value of a header: plain characters only, bounded in number and length."""
    listed = list(dict.fromkeys(names))
    shown = [_plain(name) for name in listed[:MAX_NAMED_FIELDS]]
    if len(listed) > MAX_NAMED_FIELDS:
        shown.append(f"and {len(listed) - MAX_NAMED_FIELDS} more")
    return ", ".join(shown)


def _plain(name: str) -> str:
    clean = "".join(c if c.isascii() and (c.isalnum() or c in "_-.[]") else "?" for c in name[:MAX_NAME_LENGTH])
    return clean + "..." if len(name) > MAX_NAME_LENGTH else clean
