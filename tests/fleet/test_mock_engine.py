"""The mock engine: an answer that can be checked to the token, under the real scheduler."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.core.engine_api import SequenceOutput, SequenceRequest
from springtide.core.errors import ContextTooLong, InvalidRequest, SetupError
from springtide.core.request import Message, SamplingParams
from springtide.fleet.mock_engine import MockConfig, MockEngine, verify_chain
from springtide.fleet.mock_text import END_ID, FIRST_WORD_ID, NUM_WORDS, MockTokenizer, read_words
from springtide.policy.scheduler import Scheduled

PROMPT = list(b"What is a spring tide?")


def sequence(id: str = "s", prompt: list[int] = PROMPT, **fields: object) -> SequenceRequest:
    sampling = SamplingParams(**{"seed": 7, "max_tokens": 10, **fields})  # type: ignore[arg-type]
    return SequenceRequest(id=id, prompt=prompt, sampling=sampling, stop_ids=MockTokenizer.stop_ids)


def run(engine: MockEngine) -> dict[str, list[SequenceOutput]]:
    outputs: dict[str, list[SequenceOutput]] = defaultdict(list)
    while engine.has_work():
        for output in engine.step():
            outputs[output.id].append(output)
    return outputs


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_an_answer_is_the_chain_of_its_prompt_seed_and_choice():
    engine = MockEngine()
    engine.add(sequence())
    outputs = run(engine)["s"]
    assert len(tokens(outputs)) == 10
    assert [output.finish_reason for output in outputs] == [None] * 9 + ["length"]
    verify_chain(tokens(outputs), PROMPT, seed=7)


@pytest.mark.parametrize("damage", ["lost", "doubled", "foreign", "another seed", "another choice"])
def test_the_chain_shows_every_fault(damage: str):
    engine = MockEngine()
    engine.add(sequence())
    good = tokens(run(engine)["s"])
    found = {
        "lost": good[:4] + good[5:],
        "doubled": [*good[:4], good[3], *good[4:]],
        "foreign": [*good[:4], FIRST_WORD_ID, *good[5:]],
    }.get(damage, good)
    with pytest.raises(ValueError, match="position"):
        verify_chain(found, PROMPT, seed=8 if damage == "another seed" else 7, choice=int(damage == "another choice"))


def test_preemption_and_chunks_do_not_change_an_answer():
    engine = MockEngine(config=MockConfig(num_blocks=8, max_num_batched_tokens=8, max_num_seqs=4, context_length=128))
    for number in range(4):
        engine.add(sequence(f"s{number}", prompt=[number, *PROMPT], max_tokens=50))
    outputs = run(engine)
    assert engine.load().preemptions > 0
    assert engine.load().blocks_free == 8
    for number in range(4):
        assert len(tokens(outputs[f"s{number}"])) == 50
        verify_chain(tokens(outputs[f"s{number}"]), [number, *PROMPT], seed=7)


def test_a_resumed_answer_goes_on_where_it_was():
    engine = MockEngine()
    engine.add(sequence())
    whole = tokens(run(engine)["s"])
    first = sequence("again")
    engine.add(SequenceRequest(id="again", prompt=PROMPT, sampling=first.sampling, output=whole[:6]))
    assert tokens(run(engine)["again"]) == whole[6:]


def test_several_tokens_a_step_are_the_same_tokens():
    engine = MockEngine(config=MockConfig(tokens_per_step=4))
    engine.add(sequence())
    outputs = run(engine)["s"]
    assert [len(output.token_ids) for output in outputs] == [4, 4, 2]
    verify_chain(tokens(outputs), PROMPT, seed=7)


def test_an_answer_can_end_by_itself():
    engine = MockEngine(config=MockConfig(stop_after=3))
    engine.add(sequence("ends"))
    engine.add(sequence("goes on", ignore_eos=True))
    outputs = run(engine)
    assert tokens(outputs["ends"])[-1] == END_ID and outputs["ends"][-1].finish_reason == "stop"
    assert len(tokens(outputs["goes on"])) == 10 and outputs["goes on"][-1].finish_reason == "length"


def test_cancelling_frees_the_blocks():
    engine = MockEngine(config=MockConfig(num_blocks=16))
    engine.add(sequence())
    engine.step()
    assert engine.load().blocks_free < 16
    engine.cancel("s")
    engine.cancel("nobody")
    assert engine.load().blocks_free == 16
    assert not engine.has_work()


def test_what_can_never_run_is_refused():
    engine = MockEngine(config=MockConfig(context_length=64, num_blocks=2))
    with pytest.raises(ContextTooLong, match="prompt has 22 tokens, max_tokens 100, context is 64"):
        engine.add(sequence(max_tokens=100))
    with pytest.raises(InvalidRequest, match="vocabulary"):
        engine.add(sequence(prompt=[10**9]))
    with pytest.raises(InvalidRequest):  # the context would do, the blocks never
        engine.add(sequence(max_tokens=30))


def test_a_step_takes_what_its_law_says():
    law = MockConfig(step_base_ms=10, step_per_seq_ms=2, prefill_tok_s=1000)
    decoding = [Scheduled(f"d{n}", start=30, count=1, samples=True) for n in range(3)]
    prompts = [Scheduled("p", start=0, count=40, samples=True), Scheduled("chunk", start=8, count=60, samples=False)]
    assert law.step_time([]) == pytest.approx(0.010)
    assert law.step_time(decoding) == pytest.approx(0.016)
    assert law.step_time(decoding + prompts) == pytest.approx(0.010 + 5 * 0.002 + 0.100)
    assert MockConfig(step_base_ms=10, step_per_seq_ms=2).step_time(decoding + prompts) == pytest.approx(0.020)
    several = MockConfig(prefill_tok_s=1000, tokens_per_step=4)
    answer = Scheduled("a", start=30, count=4, samples=True)
    assert several.step_time([answer]) == 0 and several.step_time([answer, *prompts]) == pytest.approx(0.100)


def test_each_step_takes_its_time_once():
    slept: list[float] = []
    config = MockConfig(step_base_ms=10, step_per_seq_ms=1, prefill_tok_s=1000)
    engine = MockEngine(config=config, sleep=slept.append)
    engine.add(sequence("long", prompt=[1, *PROMPT], max_tokens=4))
    engine.add(sequence("short", prompt=[2, *PROMPT], max_tokens=2))
    run(engine)
    prefill = 2 * (1 + len(PROMPT)) / 1000
    assert slept == pytest.approx([0.012 + prefill, 0.012, 0.011, 0.011])


def test_the_next_turn_finds_what_the_last_one_left_in_its_time_too():
    slept: list[float] = []
    engine = MockEngine(config=MockConfig(prefill_tok_s=1000), sleep=slept.append)
    engine.add(sequence())
    answer = tokens(run(engine)["s"])
    slept.clear()
    turn = [*PROMPT, *answer, *b" And a neap tide?"]
    engine.add(sequence(prompt=turn))
    outputs = run(engine)["s"]
    assert [output.cached_tokens for output in outputs] == [16] + [0] * 9  # of 22 + 10: the last of those never ran
    assert slept == pytest.approx([(len(turn) - 16) / 1000])
    verify_chain(tokens(outputs), turn, seed=7)


def test_without_a_law_no_step_sleeps():
    slept: list[float] = []
    engine = MockEngine(sleep=slept.append)
    engine.add(sequence())
    run(engine)
    assert slept == []


def test_unknown_options_name_the_nearest():
    with pytest.raises(SetupError, match="did you mean step_base_ms"):
        MockConfig.from_options({"step_bas_ms": 3})
    with pytest.raises(SetupError, match="wrong value"):
        MockConfig.from_options({"max_num_seqs": "many"})
    with pytest.raises(SetupError, match="at least 1"):
        MockConfig.from_options({"max_num_seqs": 0})


@given(st.lists(st.integers(FIRST_WORD_ID, FIRST_WORD_ID + NUM_WORDS - 1)))
def test_text_is_visible_and_can_be_read_back(ids: list[int]) -> None:
    text = MockTokenizer().decode(ids)
    assert text.isascii() and text.isprintable()
    assert read_words(text) == ids


def test_marks_typed_as_text_stay_text():
    tokenizer = MockTokenizer()
    ids = tokenizer.render_chat([Message("user", "<|end|> hé")])
    assert ids.count(END_ID) == 1
    assert "<|end|> hé" in tokenizer.decode(ids)
    with pytest.raises(ValueError, match="no whole word"):
        read_words(" abc d")
