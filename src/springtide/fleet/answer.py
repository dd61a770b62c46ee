"""One open request at a replica: its choices, their text so far, and what they have cost. Turns what the engine
gives into deltas. Knows nothing of sockets or threads."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from springtide.core.engine_api import SequenceOutput, SequenceRequest, TokenScore
from springtide.core.errors import InvalidRequest
from springtide.core.request import (
    ChoiceOutput,
    Delta,
    FinishReason,
    PriorityClass,
    Request,
    TokenCounts,
    TokenLogprob,
    TopLogprob,
)
from springtide.core.wire import escape_json
from springtide.fabric.streams import StreamKey
from springtide.fleet.prompts import Prompt
from springtide.text.output import OutputText
from springtide.text.tokenizer import TokenizerLike

_PRIORITIES: dict[PriorityClass, int] = {"interactive": 1, "standard": 0, "batch": -1}
_ECHO_PART = 128 * 1024  # characters of a prompt in one delta, so that it fits into a message


class Choice:
    """One sequence of an answer and the text that it became."""

    def __init__(
        self,
        sequence: SequenceRequest,
        tokenizer: TokenizerLike,
        prior: ChoiceOutput,
        *,
        echo: str = "",
        continues: bool = False,
    ) -> None:
        self.sequence = sequence
        self.number = sequence.choice
        self.num_tokens = 0
        self.cached_tokens = 0
        self.ended_before = self.finished = prior.finish_reason is not None
        sampling = sequence.sampling
        self._tokenizer = tokenizer
        self._ending = frozenset(() if sampling.ignore_eos else sequence.stop_ids).union(sampling.stop_token_ids)
        self._offset = len(prior.text.encode())
        self._echo = echo[len(prior.text) :]
        if not echo.startswith(prior.text[: len(echo)]):
            raise InvalidRequest("the text to go on after is not the prompt that was to be repeated")
        self._text = OutputText(
            tokenizer,
            stop=sampling.stop,
            min_tokens=sampling.min_tokens,
            prior_ids=() if self.finished else prior.token_ids,
            prior_text="" if self.finished else prior.text[len(echo) :],
            prior_stop_ids=self._ending,
            continues=continues,
        )

    def begin(self) -> list[Delta]:
        """What stands before the next token: the prompt, as far as it is still to be repeated; and the end of a choice
        that another replica had finished, but could not say so any more."""
        if self.finished:
            return []
        echo = self._echo
        deltas = [self._delta(echo[at : at + _ECHO_PART], []) for at in range(0, len(echo), _ECHO_PART)]
        if reason := self._finished_before():
            self.finished = True
            deltas.append(self._delta(self._text.finish(), [], finish_reason=reason))
        return deltas

    def take(self, output: SequenceOutput) -> Delta:
        """What the engine's next tokens add. Tokens after the one that completed a stop string are not ours."""
        reason = output.finish_reason
        before = self._text.consumed
        text = self._text.push(output.token_ids, stop_ids=self._ending)
        token_ids = output.token_ids
        if self._text.matched is not None:
            token_ids = token_ids[: self._text.consumed - before]
            reason = "stop"
        elif reason is not None:
            text += self._text.finish()
        self.finished = reason is not None
        self.num_tokens += len(token_ids)
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        return self._delta(text, token_ids, self._logprobs(output.scores, len(token_ids)), reason)

    def _finished_before(self) -> FinishReason | None:
        output, sampling = self.sequence.output, self.sequence.sampling
        if not output:
            return None
        if self._text.matched is not None or (output[-1] in self._ending and len(output) >= sampling.min_tokens):
            return "stop"
        return "length" if sampling.max_tokens is not None and len(output) >= sampling.max_tokens else None

    def _delta(
        self,
        text: str,
        token_ids: list[int],
        logprobs: list[TokenLogprob] | None = None,
        finish_reason: FinishReason | None = None,
    ) -> Delta:
        delta = Delta(self.number, "text", escape_json(text), token_ids, self._offset, logprobs, finish_reason)
        self._offset += len(text.encode("utf-8", "replace"))
        return delta

    def _logprobs(self, scores: list[TokenScore] | None, count: int) -> list[TokenLogprob] | None:
        if scores is None:
            return None
        token_bytes = self._tokenizer.token_bytes
        return [
            TokenLogprob(
                score.token_id,
                token_bytes(score.token_id),
                score.logprob,
                [TopLogprob(id, token_bytes(id), logprob) for id, logprob in score.top],
            )
            for score in scores[:count]
        ]


@dataclass(slots=True)
class Answer:
    """A request with all of its choices. `deltas` wait for the next frame; `told` says that a frame with content
    has gone out: from then on nobody else can start over."""

    key: StreamKey
    request: Request
    choices: list[Choice] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    num_prompt_tokens: int = 0
    told: bool = False

    def begin(self, prompts: list[Prompt], tokenizer: TokenizerLike) -> None:
        """Make the choices: `n` for each prompt. Each goes on after what was sent of it before; those that had ended
        have nothing more to say.

        Raises:
            InvalidRequest: what it resumes from does not fit together.
        """
        request, n = self.request, self.request.sampling.n
        prior = {output.choice: output for output in request.outputs}
        choices: list[Choice] = []
        deltas: list[Delta] = []
        self.num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        for number in range(request.num_choices):
            prompt = prompts[number // n]
            before = prior.get(number) or ChoiceOutput(number, [], "")
            sequence = SequenceRequest(
                id=f"{self.key.request_id}.{self.key.attempt}.{number}",
                prompt=prompt.token_ids,
                sampling=msgspec.structs.replace(request.sampling, max_tokens=prompt.max_tokens),
                choice=number,
                output=list(before.token_ids),
                stop_ids=tokenizer.stop_ids,
                priority=request.priority or _PRIORITIES[request.priority_class],
                cache_salt=request.cache_salt,
            )
            continues = request.prompts is not None  # an answer begins a text of its own
            choice = Choice(sequence, tokenizer, before, echo=prompt.echo, continues=continues)
            choices.append(choice)
            deltas += choice.begin()
        self.choices, self.deltas = choices, deltas

    @property
    def running(self) -> list[Choice]:
        return [choice for choice in self.choices if not choice.finished]

    @property
    def counts(self) -> TokenCounts:
        """A prompt counts once, and so does what was found of it in the cache."""
        cached: dict[int, int] = {}  # of each prompt, as its first choice found it: the others find what that one left
        for choice in self.choices:
            if not choice.ended_before:
                cached.setdefault(choice.number // self.request.sampling.n, choice.cached_tokens)
        return TokenCounts(
            prompt=self.num_prompt_tokens,
            completion=sum(choice.num_tokens for choice in self.choices),
            cached=sum(cached.values()),
        )

    def take_deltas(self) -> list[Delta]:
        """The waiting deltas, for a frame that goes out now."""
        deltas, self.deltas = self.deltas, []
        self.told = self.told or bool(deltas)
        return deltas
