"""From a request to the prompts that an engine can run, or to the reason why not. Slow for long texts: the caller
chooses the thread. Knows nothing of sockets or of what else runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from springtide.core.engine_api import EngineInfo
from springtide.core.errors import ContextTooLong, InvalidRequest
from springtide.core.request import Request
from springtide.text.tokenizer import TokenizerLike


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as tokens. `echo` is its text if the client wants it repeated, else ""."""

    token_ids: list[int]
    echo: str
    max_tokens: int


def prepare(request: Request, tokenizer: TokenizerLike, info: EngineInfo) -> list[Prompt]:
    """The prompts of a request, in order, checked so that an engine like `info` can run them to their end.

    Raises:
        InvalidRequest: it makes no sense, or not for this model.
        ContextTooLong: with the number of tokens that there are and that there may be.
    """
    sampling = request.sampling.check()
    for id in (*sampling.logit_bias, *sampling.stop_token_ids):
        _check_token(id, info, "logit_bias" if id in sampling.logit_bias else "stop_token_ids")
    prompts = []
    for token_ids, echo in _tokenize(request, tokenizer, info):
        if not token_ids:
            raise InvalidRequest("the prompt is empty", param="prompt")
        prompts.append(Prompt(token_ids, echo, _max_tokens(len(token_ids), sampling.max_tokens, info)))
    return prompts


def size(request: Request) -> int:
    """Roughly how many bytes there are to tokenise."""
    texts: Iterator[int] = (len(message.content or "") for message in request.messages or ())
    return sum(texts) + sum(map(len, request.prompts or ()))


def _tokenize(request: Request, tokenizer: TokenizerLike, info: EngineInfo) -> Iterator[tuple[list[int], str]]:
    """Each prompt as token ids, with the text to echo."""
    if (request.messages is None) == (request.prompts is None):
        raise InvalidRequest("a request has either messages or a prompt")
    if request.messages is not None:
        if not request.messages:
            raise InvalidRequest("messages is empty", param="messages")
        yield tokenizer.render_chat(request.messages, now=request.created), ""
        return
    if not request.prompts:
        raise InvalidRequest("the prompt is empty", param="prompt")
    for prompt in request.prompts:
        if isinstance(prompt, str):
            yield tokenizer.encode(prompt), prompt if request.echo else ""
        else:
            for id in prompt:
                _check_token(id, info, "prompt")
            yield list(prompt), tokenizer.decode(list(prompt)) if request.echo else ""


def _check_token(id: int, info: EngineInfo, param: str) -> None:
    if not 0 <= id < info.vocab_size:
        raise InvalidRequest(f"token id {id} is outside the model's vocabulary of {info.vocab_size}", param=param)


def _max_tokens(num_prompt: int, wanted: int | None, info: EngineInfo) -> int:
    """How many tokens an answer may have: what was asked for, or all that the context holds."""
    context = min(info.context_length, info.num_blocks * info.block_size)
    needed = num_prompt + (1 if wanted is None else wanted)
    if needed > context:
        raise ContextTooLong(
            f"prompt has {num_prompt} tokens, max_tokens {'unset' if wanted is None else wanted}, context is {context}",
            param="messages" if wanted is None else "max_tokens",
        )
    return context - num_prompt if wanted is None else wanted
