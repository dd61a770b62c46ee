"""Messages to the text of a prompt, by the model's own chat template. Knows nothing of tokens.

The template is somebody else's program, and the messages are anybody's: neither can reach beyond the rendering,
keep it from ending, or pass itself off as the other.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jinja2
import msgspec

from springtide.core.errors import InvalidRequest, SetupError
from springtide.core.request import Message
from springtide.text.template_budget import Budget, OutOfBudget
from springtide.text.template_sandbox import BUDGET, NOW, RaisedByTemplate, TemplateEnvironment
from springtide.text.template_text import TemplateText

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MAX_SOURCE = 1_000_000


class ChatTemplate:
    """A compiled chat template; rendering is safe from any thread.

    Args:
        tokens: What the template may call by name, such as "bos_token".

    Raises:
        SetupError: the template can't be compiled.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        if len(source) > _MAX_SOURCE:
            raise SetupError(f"the chat template has {len(source)} characters; up to {_MAX_SOURCE} are read")
        self._tokens = {name: TemplateText.whole(token) for name, token in tokens.items()}
        try:
            self._template = _environment().from_source(source)
        except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise SetupError(f"the model's chat template is broken: {error or type(error).__name__}") from None

    def render(self, messages: Sequence[Message], *, now: float | None = None) -> str:
        """The prompt, up to where the assistant begins to speak. What the template wrote itself is marked as
        `TemplateText`. `now` (unix seconds) is the date for templates that print it.

        Raises:
            InvalidRequest: the template refuses the messages, fails on them, or does not come to an end.
        """
        values = [_as_template_value(message) for message in messages]
        try:
            budget = Budget(sum(map(_size, messages)))
            context = self._template.new_context(
                {
                    **self._tokens,
                    "messages": values,
                    "add_generation_prompt": True,
                    "tools": None,
                    "documents": None,
                    BUDGET: budget,
                    NOW: time.time() if now is None else now,
                }
            )
            return budget.check_prompt(_environment().concat(self._template.root_render_func(context)))
        except RaisedByTemplate as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None
        except OutOfBudget as error:
            raise InvalidRequest(f"the model's chat template was stopped: {error}", param="messages") from None
        except Exception as error:  # a template is a program: whatever it meets in these messages
            reason = str(error) or type(error).__name__
            raise InvalidRequest(
                f"the model's chat template can't render these messages: {reason[:500]}", param="messages"
            ) from error


@cache
def _environment() -> TemplateEnvironment:
    return TemplateEnvironment()


def _as_template_value(message: Message) -> dict[str, Any]:
    """A message as templates know it. The role is one of few words, and so as good as the template's own: many
    make their control tokens with it."""
    if message.role not in ROLES:
        raise InvalidRequest(f"unknown role {message.role[:100]!r}; known: {', '.join(ROLES)}", param="messages")
    # Models were trained before "developer" was a word for it.
    role = "system" if message.role == "developer" else message.role
    value: dict[str, Any] = {"role": TemplateText.whole(role), "content": message.content}
    if message.name is not None:
        value["name"] = message.name
    if message.tool_call_id is not None:
        value["tool_call_id"] = message.tool_call_id
    if message.tool_calls is not None:
        value["tool_calls"] = [_with_parsed_arguments(call) for call in message.tool_calls]
    return value


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """The API carries arguments as JSON in a string; templates want the object, and write JSON themselves."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"])
    except (msgspec.DecodeError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _size(message: Message) -> int:
    return len(message.content or "") + len(msgspec.json.encode(message.tool_calls or []))
