"""What clients ask of a mock model, what the one right answer is, and what is wrong with another.

The mock's tokens are a hash chain over prompt, seed and choice, so the answer is known beforehand to the last byte.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import msgspec

from springtide.cli.lab.client import Heard
from springtide.core.request import Message
from springtide.fleet.mock_engine import chain
from springtide.fleet.mock_text import WORD_LENGTH, MockTokenizer, read_words, word

Dialect = Literal["chat", "completions"]
PATHS: dict[Dialect, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}

_TOKENIZER = MockTokenizer()


class Expected(NamedTuple):
    """The right answer of one choice."""

    text: str
    tokens: int
    reason: str
    scored: list[str]  # the tokens with scores, as text


@dataclass(frozen=True)
class Question:
    """One request, and what its answer must be."""

    dialect: Dialect
    prompt: str
    stream: bool
    max_tokens: int
    seed: int
    n: int = 1
    stop: str | None = None
    logprobs: bool = False
    model: str = "lab"

    @property
    def path(self) -> str:
        return PATHS[self.dialect]

    @property
    def body(self) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "n": self.n,
            "ignore_eos": True,
            "stream": self.stream,
        }
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        if self.stop is not None:
            body["stop"] = self.stop
        if self.dialect == "chat":
            body["messages"] = [{"role": "user", "content": self.prompt}]
        else:
            body["prompt"] = self.prompt
        if self.logprobs:
            body |= {"logprobs": True, "top_logprobs": 2} if self.dialect == "chat" else {"logprobs": 2}
        return msgspec.json.encode(body)

    @cached_property
    def prompt_ids(self) -> list[int]:
        if self.dialect == "completions":
            return _TOKENIZER.encode(self.prompt)
        return _TOKENIZER.render_chat([Message("user", self.prompt)])

    def words(self, choice: int) -> list[str]:
        """Of a choice that nothing but `max_tokens` ends."""
        tokens = itertools.islice(chain(self.prompt_ids, self.seed, choice), self.max_tokens)
        return [word(token) for token in tokens]

    def expected(self, choice: int) -> Expected:
        words = self.words(choice)
        text, tokens, reason = "".join(words), len(words), "length"
        if self.stop is not None and (cut := text.find(self.stop)) >= 0:
            tokens = -(-(cut + len(self.stop)) // WORD_LENGTH)
            text, reason = text[:cut], "stop"
        return Expected(text, tokens, reason, words[:tokens] if self.logprobs else [])


class Questions:
    """An endless row of different questions, the same for the same seed: two of three are streams; some have two
    choices, a stop string that lies across two tokens, scores."""

    def __init__(self, seed: int, tokens: tuple[int, int]) -> None:
        self._chance = random.Random(seed)
        self._tokens = tokens
        self._numbers = itertools.count(1)

    def next(self) -> Question:
        chance, number = self._chance, next(self._numbers)
        question = Question(
            dialect=chance.choice(("chat", "chat", "completions")),
            prompt=f"question {number}: " + "why " * chance.randrange(60),
            stream=chance.random() < 2 / 3,
            max_tokens=chance.randint(*self._tokens),
            seed=chance.getrandbits(40),
            n=2 if chance.random() < 0.25 else 1,
            logprobs=chance.random() < 0.25,
        )
        if chance.random() < 0.25:
            return replace(question, stop=self._stop(question))
        return question

    def _stop(self, question: Question) -> str:
        """The end of one word of the first choice, and the beginning of the next."""
        words = question.words(0)
        at = self._chance.randrange(len(words) // 2, len(words) - 1)
        return words[at][2:] + words[at + 1][:2]


@dataclass(slots=True)
class Verdict:
    """What was wrong with an answer: tokens that were lost, doubled, or belong to no such answer; and all else, in
    words."""

    lost: int = 0
    doubled: int = 0
    foreign: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        return not (self.lost or self.doubled or self.foreign or self.faults)


def judge(question: Question, heard: Heard) -> Verdict:
    """Hold what a client heard of a complete answer against what it should have heard."""
    verdict = Verdict()
    if not heard.done:
        verdict.faults.append(heard.error or "no answer")
        return verdict
    if len(heard.ids) != 1:
        verdict.faults.append(f"{len(heard.ids)} ids")
    expected = [question.expected(choice) for choice in range(question.n)]
    if surplus := heard.texts.keys() - set(range(question.n)):
        verdict.faults.append(f"choices {sorted(surplus)} that nobody asked for")
    for choice, right in enumerate(expected):
        _judge_choice(question, heard, choice, right, verdict)
    counted = [(used.prompt_tokens, used.completion_tokens) for used in heard.usages]
    owed = (len(question.prompt_ids), sum(right.tokens for right in expected))
    if counted != [owed]:
        verdict.faults.append(f"usage {counted} instead of once {owed}")
    return verdict


def _judge_choice(question: Question, heard: Heard, choice: int, right: Expected, verdict: Verdict) -> None:
    text = "".join(heard.texts[choice])
    if text != right.text:
        lost, doubled, foreign = compare(text, right.text)
        verdict.lost += lost
        verdict.doubled += doubled
        verdict.foreign += foreign
    roles = 1 if question.dialect == "chat" else 0
    if heard.roles[choice] != roles:
        verdict.faults.append(f"{heard.roles[choice]} roles of choice {choice}")
    if heard.finishes[choice] != [right.reason]:
        verdict.faults.append(f"choice {choice} finished {heard.finishes[choice]} instead of once {right.reason}")
    if heard.scored[choice] != right.scored:
        verdict.faults.append(f"choice {choice} has scores of {len(heard.scored[choice])}, not {len(right.scored)}")


def compare(text: str, right: str) -> tuple[int, int, int]:
    """How many words of `right` are lost in `text`, which are there too often, and which do not belong there.

    A text that differs but for none of these (words in another order, a torn word) has one foreign word."""
    found, wanted = _words(text), _words(right)
    lost = sum((wanted - found).values())
    surplus = found - wanted
    doubled = sum(count for token, count in surplus.items() if token in wanted)
    foreign = sum(surplus.values()) - doubled
    return lost, doubled, foreign or int(not (lost or doubled))


def _words(text: str) -> Counter[int | str]:
    """Its words; what is none counts as one that nobody knows."""
    whole = len(text) - len(text) % WORD_LENGTH
    words: Counter[int | str] = Counter([text[whole:]] if text[whole:] else [])
    for at in range(0, whole, WORD_LENGTH):
        part = text[at : at + WORD_LENGTH]
        try:
            words.update(read_words(part))
        except ValueError:
            words[part] += 1
    return words
