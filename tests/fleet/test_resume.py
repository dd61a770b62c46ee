"""An answer that is cut anywhere and goes on at another replica is, byte for byte, the answer that was not cut."""

from __future__ import annotations

from collections import defaultdict
from itertools import accumulate, pairwise
from pathlib import Path

import msgspec
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from springtide.core.errors import InvalidRequest
from springtide.core.request import ChoiceOutput, Delta, FinishReason, Message, Request, SamplingParams, TokenLogprob
from springtide.core.store import ModelFiles
from springtide.core.wire import unescape_json
from springtide.fabric.streams import StreamKey
from springtide.fleet.answer import Answer
from springtide.fleet.mock_engine import MockConfig, MockEngine, verify_chain
from springtide.fleet.mock_text import MockTokenizer, word
from springtide.fleet.prompts import prepare
from springtide.text.tokenizer import Tokenizer, TokenizerLike

LETTERS = sorted(ByteLevel.alphabet())
STOP_ID = LETTERS.index("#")  # a token that ends answers and is a letter otherwise


class ScriptedEngine(MockEngine):
    """Says what is written, to whoever asks; the second choice says it backwards."""

    def __init__(self, script: list[int], tokens_per_step: int) -> None:
        super().__init__(config=MockConfig(tokens_per_step=tokens_per_step))
        self._script = script

    def _next_token(self, sequence) -> int:  # type: ignore[no-untyped-def]
        script = self._script[::-1] if sequence.request.choice else self._script
        return script[sequence.num_output % len(script)]


class Said:
    """What a client has of an answer."""

    def __init__(self, choices: int) -> None:
        self.texts = [""] * choices
        self.token_ids: defaultdict[int, list[int]] = defaultdict(list)
        self.logprobs: defaultdict[int, list[TokenLogprob]] = defaultdict(list)
        self.reasons: list[FinishReason | None] = [None] * choices

    def hear(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            choice = delta.choice
            assert self.reasons[choice] is None, "it goes on after its end"
            assert delta.offset == len(self.texts[choice].encode()), "text is missing, or comes twice"
            self.texts[choice] += unescape_json(delta.text)
            self.token_ids[choice] += delta.token_ids
            self.logprobs[choice] += delta.logprobs or []
            self.reasons[choice] = delta.finish_reason

    @property
    def outputs(self) -> tuple[ChoiceOutput, ...]:
        said = (
            ChoiceOutput(choice, list(self.token_ids[choice]), text, self.reasons[choice])
            for choice, text in enumerate(self.texts)
        )
        return tuple(output for output in said if output.token_ids or output.text)


def answer(request: Request, engine: MockEngine, tokenizer: TokenizerLike) -> tuple[list[list[Delta]], Answer]:
    """The frames that a replica would send, and what it has of the request at the end."""
    said = Answer(StreamKey(request.id, 1), request)
    said.begin(prepare(request, tokenizer, engine.info), tokenizer)
    running = {choice.sequence.id: choice for choice in said.running}
    for choice in running.values():
        engine.add(choice.sequence)
    frames = [said.take_deltas()]
    while running:
        for output in engine.step():
            choice = running[output.id]
            said.deltas.append(choice.take(output))
            if choice.finished:
                engine.cancel(running.pop(output.id).sequence.id)
        frames.append(said.take_deltas())
    return frames, said


def check_every_cut(request: Request, engine: MockEngine, tokenizer: TokenizerLike) -> Said:
    """Cut after each frame, and go on elsewhere; also cut the rest again. What was said without a cut."""
    frames, _ = answer(request, engine, tokenizer)
    whole = heard(request, frames)
    assert None not in whole.reasons
    for cut in range(len(frames)):
        before = heard(request, frames[:cut])
        resumed = msgspec.structs.replace(request, outputs=before.outputs)
        rest, second = answer(resumed, engine, tokenizer)
        assert second.counts.completion == num_tokens(whole) - num_tokens(before), "each pays for what it did"
        assert vars(heard(request, frames[:cut] + rest)) == vars(whole), f"cut after frame {cut}"
        once_more = heard(request, frames[:cut] + rest[: len(rest) // 2])
        last, _ = answer(msgspec.structs.replace(request, outputs=once_more.outputs), engine, tokenizer)
        assert vars(heard(request, frames[:cut] + rest[: len(rest) // 2] + last)) == vars(whole)
    return whole


def heard(request: Request, frames: list[list[Delta]]) -> Said:
    said = Said(request.num_choices)
    for deltas in frames:
        said.hear(deltas)
    return said


def num_tokens(said: Said) -> int:
    return sum(map(len, said.token_ids.values()))


def completion(*prompts: str, echo: bool = False, **sampling: object) -> Request:
    chosen = SamplingParams(**{"seed": 7, "max_tokens": 9, **sampling})  # type: ignore[arg-type]
    return Request(id="r", model="m", tenant="t", sampling=chosen, prompts=prompts, echo=echo)


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A model's tokenizer from files: one token for each byte, so that most characters take several."""
    folder: Path = tmp_path_factory.mktemp("letters")
    backend = tokenizers.Tokenizer(BPE(vocab={name: id for id, name in enumerate(LETTERS)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(ModelFiles("letters", str(folder), folder, "safetensors", "sha256:"))


texts = st.text(st.sampled_from("aab#é日🌊 "), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    text=texts,
    broken=st.lists(st.integers(0, 255), max_size=3),
    stop=st.lists(st.text(st.sampled_from("abé日"), min_size=1, max_size=4), max_size=2),
    min_tokens=st.integers(0, 8),
    max_tokens=st.integers(8, 24),
    tokens_per_step=st.integers(1, 3),
    n=st.integers(1, 2),
    echo=st.booleans(),
    ends=st.booleans(),
)
def test_no_cut_can_be_seen(
    letters: Tokenizer,
    text: str,
    broken: list[int],
    stop: list[str],
    min_tokens: int,
    max_tokens: int,
    tokens_per_step: int,
    n: int,
    echo: bool,
    ends: bool,
) -> None:
    script = letters.encode(text) + broken
    request = completion(
        "éa",
        echo=echo,
        n=n,
        stop=tuple(stop),
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        logprobs=1,
        stop_token_ids=(STOP_ID,) if ends else (),
    )
    check_every_cut(request, ScriptedEngine(script, tokens_per_step), letters)


def test_a_stop_string_that_has_begun_before_the_cut_is_found_after_it(letters: Tokenizer) -> None:
    engine = ScriptedEngine(letters.encode("one two é🌊 stop here"), 1)
    whole = check_every_cut(completion("x", stop=("é🌊 stop",), max_tokens=40), engine, letters)
    assert whole.texts == ["one two "] and whole.reasons == ["stop"]


def test_the_mocks_words_prove_that_no_token_is_lost_doubled_or_foreign() -> None:
    tokenizer = MockTokenizer()
    request = completion("first", "second", n=2, max_tokens=6, logprobs=2)
    whole = check_every_cut(request, MockEngine(config=MockConfig(tokens_per_step=2)), tokenizer)
    for choice in range(4):
        prompt = tokenizer.encode(("first", "second")[choice // 2])
        verify_chain(whole.token_ids[choice], prompt, 7, choice)
        assert whole.texts[choice] == "".join(map(word, whole.token_ids[choice]))


def test_a_chat_goes_on_too_and_what_ends_by_itself_ends_there() -> None:
    request = msgspec.structs.replace(completion(), prompts=None, messages=(Message("user", "hi"),))
    whole = check_every_cut(request, MockEngine(config=MockConfig(stop_after=4)), MockTokenizer())
    assert whole.reasons == ["stop"] and len(whole.token_ids[0]) == 5


def test_of_a_prompt_that_is_repeated_the_rest_is_repeated() -> None:
    prompt = "é" * 200_000  # in more than one part
    tokenizer = MockTokenizer()
    engine = MockEngine(config=MockConfig(context_length=500_000, max_num_batched_tokens=500_000))
    frames, _ = answer(completion(prompt, echo=True, max_tokens=2), engine, tokenizer)
    parts = frames[0]
    ends = list(accumulate(len(unescape_json(part.text)) for part in parts))
    assert len(parts) > 1 and all(before < after for before, after in pairwise(ends))
    said = heard(completion(prompt), [parts[:1]])
    resumed = msgspec.structs.replace(completion(prompt, echo=True, max_tokens=2), outputs=said.outputs)
    rest, _ = answer(resumed, engine, tokenizer)
    for deltas in rest:
        said.hear(deltas)
    assert said.texts == ["".join(unescape_json(d.text) for deltas in frames for d in deltas)]


def test_choices_that_had_ended_are_not_run_and_say_nothing() -> None:
    engine, tokenizer = MockEngine(), MockTokenizer()
    outputs = (ChoiceOutput(0, [300], word(300), "stop"), ChoiceOutput(1, [], ""))
    frames, said = answer(msgspec.structs.replace(completion("hi", n=2), outputs=outputs), engine, tokenizer)
    assert {delta.choice for deltas in frames for delta in deltas} == {1}
    assert said.counts.completion == 9 and said.counts.prompt == 2


@pytest.mark.parametrize("text", ["other", "hi and other"])
def test_what_does_not_fit_together_is_refused(text: str) -> None:
    outputs = (ChoiceOutput(0, [300], text),)
    with pytest.raises(InvalidRequest, match="to go on after"):
        answer(msgspec.structs.replace(completion("hi", echo=True), outputs=outputs), MockEngine(), MockTokenizer())


@pytest.mark.parametrize(("name", "priority"), [("interactive", 1), ("standard", 0), ("batch", -1)])
def test_classes_are_pushed_out_in_their_order(name: str, priority: int) -> None:
    tokenizer = MockTokenizer()
    for wanted, asked in ((priority, 0), (5, 5)):
        request = msgspec.structs.replace(completion("hi"), priority_class=name, priority=asked)
        said = Answer(StreamKey("r", 1), request)
        said.begin(prepare(request, tokenizer, MockEngine().info), tokenizer)
        assert said.choices[0].sequence.priority == wanted
