"""OpenAI's request bodies, as they come, and as our `Request`. Knows nothing of HTTP, nor of what comes back.

The body is decoded once into a Struct that names every field we act on. Its field names are read once more,
without their values, so that what we don't know can be named.
"""

from __future__ import annotations

import random
import re
from typing import Any, Literal, TypeVar

import msgspec

from springtide.core import wire
from springtide.core.errors import InvalidRequest
from springtide.core.request import MAX_CHOICES, Message, PriorityClass, Request, SamplingParams
from springtide.gateway.fields import check_fields

Dialect = Literal["chat", "completions"]

# Templates of open models know these; `developer` is what newer clients call `system`.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_COMPLETION_MAX_TOKENS = 16  # OpenAI's default for the older endpoint
_CACHE_SCOPES = ("tenant", "shared", "none")
_WHERE = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class _Body(msgspec.Struct, kw_only=True):
    """What both endpoints take. None is as good as absent: clients send nulls."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = None
    cache_scope: str | None = None


class ChatBody(_Body, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class CompletionBody(_Body, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None


# Fields that mean the same, under the same name, in SamplingParams.
_SAME = tuple(
    name
    for name in _Body.__struct_fields__
    if name in SamplingParams.__struct_fields__ and name not in ("stop", "stop_token_ids", "top_k", "seed")
)


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateway itself adds to a body. Times in unix seconds. `seed` is for a client that names none; None:
    one is drawn."""

    id: str
    tenant: str
    created: float
    deadline: float | None = None
    seed: int | None = None
    weight: float = 1.0
    priority_class: PriorityClass = "standard"


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A body understood: what to run, how to answer, and which fields had no effect."""

    request: Request
    dialect: Dialect
    stream: bool
    include_usage: bool
    ignored: list[str]


def parse_chat(data: bytes, admission: Admission) -> Call:
    """The body of POST /v1/chat/completions.

    Raises:
        InvalidRequest: it is no JSON, has a wrong type, a value out of range, or asks for what we can't do.
    """
    body, ignored = _decode(data, _chat_decoder)
    if not body.messages:
        raise InvalidRequest("messages is empty; a chat needs at least one message", param="messages")
    messages = tuple(_message(message, f"messages[{i}]") for i, message in enumerate(body.messages))
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    sampling = _sampling(body, max_tokens, _chat_logprobs(body), admission.seed)
    return _call("chat", body, admission, sampling, ignored, messages=messages)


def parse_completion(data: bytes, admission: Admission) -> Call:
    """The body of POST /v1/completions. Raises as `parse_chat`."""
    body, ignored = _decode(data, _completion_decoder)
    prompts = _prompts(body.prompt)
    if body.echo and body.logprobs is not None:
        raise InvalidRequest("echo together with logprobs is not supported", param="echo", code="unsupported_parameter")
    max_tokens = _COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = _sampling(body, max_tokens, body.logprobs, admission.seed)
    return _call("completions", body, admission, sampling, ignored, prompts=prompts, echo=bool(body.echo))


def _call(
    dialect: Dialect, body: _Body, admission: Admission, sampling: SamplingParams, ignored: list[str], **content: Any
) -> Call:
    request = Request(
        id=admission.id,
        model=body.model,
        tenant=admission.tenant,
        sampling=sampling,
        weight=admission.weight,
        priority_class=admission.priority_class,
        created=admission.created,
        deadline=admission.deadline,
        cache_salt=_cache_salt(body, admission.tenant),
        **content,
    )
    if request.num_choices > MAX_CHOICES:
        raise InvalidRequest(
            f"the request asks for {request.num_choices} completions (prompts times n); at most {MAX_CHOICES} at once",
            param="n" if sampling.n > 1 else "prompt",
        )
    options = body.stream_options
    stream = bool(body.stream)
    if options is not None and not stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", param="stream_options")
    return Call(
        request=request,
        dialect=dialect,
        stream=stream,
        include_usage=options is not None and bool(options.include_usage),
        ignored=ignored,
    )


def _cache_salt(body: _Body, tenant: str) -> str | None:
    """With whom the request shares what is cached of its prompt: by default with its own tenant alone, of whom a
    salt of the client's takes a part; on request with all who ask for it too (""), or with nobody (None)."""
    scope, salt = body.cache_scope or "tenant", body.cache_salt
    if scope not in _CACHE_SCOPES:
        raise InvalidRequest(
            f"cache_scope is {scope[:40]!r}; known ones are {', '.join(_CACHE_SCOPES)}", param="cache_scope"
        )
    if scope == "tenant":
        return f"{tenant}/{salt}" if salt else tenant
    if salt:
        raise InvalidRequest(
            f"cache_salt divides a tenant's own cache; with cache_scope {scope} it would say nothing",
            param="cache_salt",
            hint="leave one of them out",
        )
    return "" if scope == "shared" else None


def _sampling(body: _Body, max_tokens: int | None, logprobs: int | None, seed: int | None) -> SamplingParams:
    given = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    given.update(max_tokens=max_tokens, logprobs=logprobs)
    ours = random.getrandbits(63) if seed is None else seed
    given["seed"] = ours if body.seed is None else body.seed
    if body.top_k is not None:
        given["top_k"] = 0 if body.top_k == -1 else body.top_k  # -1 is off, as elsewhere
    if body.stop is not None:
        given["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.stop_token_ids is not None:
        given["stop_token_ids"] = tuple(body.stop_token_ids)
    return SamplingParams(**given).check()


def _chat_logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    return None


def _message(message: ChatMessage, where: str) -> Message:
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidRequest(
            f"{where}.role is {message.role[:40]!r}; known roles are {', '.join(_ROLES)}", param=f"{where}.role"
        )
    content = message.content
    if content is None and not (role == "assistant" and message.tool_calls):
        raise InvalidRequest(f"{where}.content is missing", param=f"{where}.content")
    if isinstance(content, list):
        content = _join_parts(content, f"{where}.content")
    if message.tool_calls:
        _check_portable(message.tool_calls, f"{where}.tool_calls")
    return Message(
        role=role,
        content=content,
        name=message.name,
        tool_call_id=message.tool_call_id,
        tool_calls=message.tool_calls,
    )


def _check_portable(value: Any, where: str) -> None:
    """Free JSON travels on as it is, but not with numbers that only JSON can hold."""
    try:
        wire.pack(value)
    except OverflowError:
        raise InvalidRequest(f"{where} holds an integer of more than 64 bits", param=where) from None
    except RecursionError:
        raise InvalidRequest(f"{where} is nested too deeply", param=where) from None


def _join_parts(parts: list[ContentPart], where: str) -> str:
    for i, part in enumerate(parts):
        if part.type != "text":
            raise InvalidRequest(
                f"{where}[{i}] is of type {part.type[:40]!r}; only text parts are supported",
                param=f"{where}[{i}].type",
                code="unsupported_content",
            )
        if part.text is None:
            raise InvalidRequest(f"{where}[{i}].text is missing", param=f"{where}[{i}].text")
    return "\n".join(part.text for part in parts if part.text is not None)


def _prompts(prompt: str | list[str | int | list[int]]) -> tuple[str | tuple[int, ...], ...]:
    """A string, a list of strings, token ids, or a list of token-id lists: one prompt each."""
    if isinstance(prompt, str):
        return (prompt,)
    kinds = {type(item) for item in prompt}
    if len(kinds) != 1:
        problem = "mixes strings, token ids and lists" if kinds else "is empty"
        raise InvalidRequest(f"prompt {problem}", param="prompt")
    (kind,) = kinds
    rows: list[Any] = [prompt] if kind is int else list(prompt)
    if kind is str:
        return tuple(rows)
    for row in rows:
        if not row or min(row) < 0 or max(row) >= 2**31:
            raise InvalidRequest("prompt has an empty list of token ids, or an id out of range", param="prompt")
    return tuple(tuple(row) for row in rows)


# ----------------------------------------------------------------------------------------------------------
# Decoding.

BodyType = TypeVar("BodyType", bound=_Body)

_chat_decoder = msgspec.json.Decoder(ChatBody)
_completion_decoder = msgspec.json.Decoder(CompletionBody)
_names_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_message_names_decoder = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])


def _decode(data: bytes, decoder: msgspec.json.Decoder[BodyType]) -> tuple[BodyType, list[str]]:
    """The body, and the names in it that nobody here knows."""
    try:
        if not data.isascii():
            data.decode()  # also what we would skip must be UTF-8
        body = decoder.decode(data)
        return body, _ignored(data, body)
    except msgspec.ValidationError as error:
        raise _invalid_value(error) from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None
    except msgspec.DecodeError as error:
        hint = "an escaped surrogate needs its other half" if _SURROGATE.search(data) else None
        raise InvalidRequest(f"the body is not JSON: {error}", hint=hint) from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


def _ignored(data: bytes, body: _Body) -> list[str]:
    fields = _names_decoder.decode(data)
    ignored = check_fields(fields, type(body).__struct_fields__)
    if body.stream_options is not None:
        options = _names_decoder.decode(fields["stream_options"])
        ignored += [f"stream_options.{name}" for name in options if name != "include_usage"]
    if isinstance(body, ChatBody):
        for message in _message_names_decoder.decode(fields["messages"]):
            unknown = message.keys() - set(ChatMessage.__struct_fields__)
            ignored += sorted(f"messages[].{name}" for name in unknown if bytes(message[name]) != b"null")
    return ignored


def _invalid_value(error: msgspec.ValidationError) -> InvalidRequest:
    """msgspec's words, with the place as OpenAI's `param`."""
    message = str(error)
    found = _WHERE.search(message)
    if found is None:
        missing = re.search(r"missing required field `(\w+)`", message)
        return InvalidRequest(message, param=missing[1] if missing else None)
    where = found[1]
    return InvalidRequest(f"{where or 'the body'}: {message[: found.start()]}", param=where or None)
