"""`LLM` as a user of the field knows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import springtide
from springtide import LLM, SamplingParams
from springtide.core.engine_api import SequenceRequest
from springtide.core.errors import ContextTooLong, InvalidRequest, SetupError
from springtide.core.store import ModelFiles
from springtide.engine import bench
from tests.engine.harness import random_prompt, run


@pytest.fixture(scope="module")
def llm(tiny_model: ModelFiles) -> LLM:
    """A folder without tokenizer."""
    return LLM(str(tiny_model.path), dtype="float32", num_blocks=64)


@pytest.fixture(scope="module")
def smollm(default_model: ModelFiles) -> LLM:
    return LLM(str(default_model.path), max_num_seqs=8, num_blocks=200)


GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


def test_the_package_offers_it() -> None:
    assert springtide.LLM is LLM


def test_token_ids_work_without_a_tokenizer(llm: LLM) -> None:
    prompts = [random_prompt(1, 9), random_prompt(2, 20)]
    results = llm.generate(prompts, GREEDY)
    assert [result.prompt_token_ids for result in results] == prompts
    assert all(result.prompt is None for result in results)
    for result in results:
        [choice] = result.outputs
        assert (choice.index, choice.text, len(choice.token_ids), choice.finish_reason) == (0, "", 6, "length")
        assert choice.logprobs is None


def test_one_prompt_is_a_list_of_one_result(llm: LLM) -> None:
    prompt = random_prompt(1, 9)
    assert llm.generate(prompt, GREEDY) == llm.generate([prompt], [GREEDY])
    assert llm.generate([], GREEDY) == []


def test_choices_and_logprobs(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=4, logprobs=2, ignore_eos=True)
    [result] = llm.generate(random_prompt(1, 9), params)
    assert [choice.index for choice in result.outputs] == [0, 1, 2]
    assert len({tuple(choice.token_ids) for choice in result.outputs}) == 3
    for choice in result.outputs:
        assert choice.logprobs is not None and len(choice.logprobs) == 4
        for token, position in zip(choice.token_ids, choice.logprobs, strict=True):
            assert position[token].logprob <= 0
            assert {entry.rank for entry in position.values()} >= {1, 2}


def test_a_prompt_does_not_feel_its_neighbours(llm: LLM) -> None:
    prompts = [random_prompt(i, 5 + 7 * i) for i in range(6)]
    params = SamplingParams(seed=3, max_tokens=8, ignore_eos=True)
    together = llm.generate(prompts, params)
    assert together == [llm.generate(prompt, params)[0] for prompt in prompts]


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 2)]
    results = llm.generate([[1, 2], [3]], params)
    assert [len(result.outputs[0].token_ids) for result in results] == [1, 2]
    with pytest.raises(InvalidRequest, match="2 sampling params for 3 prompts"):
        llm.generate([[1], [2], [3]], params)


def test_a_bad_prompt_spoils_nothing(llm: LLM) -> None:
    with pytest.raises(ContextTooLong):
        llm.generate([[1, 2], [1] * 600], GREEDY)
    with pytest.raises(InvalidRequest, match="temperature"):
        llm.generate([1, 2], SamplingParams(temperature=3.0))
    assert not llm.engine.has_work()
    assert llm.engine.load().blocks_free == 64


def test_text_without_a_tokenizer_is_refused_in_a_sentence(llm: LLM) -> None:
    with pytest.raises(SetupError, match=r"can't read or write text.*give token ids"):
        llm.generate("hello")
    with pytest.raises(SetupError, match="can't read or write text"):
        llm.generate([1, 2], SamplingParams(stop=("x",)))


def test_loading_shows_how_far_it_is_where_that_is_wanted(
    tiny_model: ModelFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    LLM(str(tiny_model.path), dtype="float32", num_blocks=1)
    assert capsys.readouterr().err == ""
    LLM(str(tiny_model.path), dtype="float32", num_blocks=1, progress=True)
    assert "warming up" in capsys.readouterr().err


def test_a_progress_bar_where_it_is_wanted(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate([[1], [2]], GREEDY)
    assert capsys.readouterr().err == ""
    llm.generate([[1], [2]], GREEDY, progress=True)
    shown = capsys.readouterr().err
    assert "prompts" in shown and "2/2" in shown and "tokens/s" in shown


def test_unknown_options_and_models_are_refused() -> None:
    with pytest.raises(SetupError, match="unknown engine option max_seqs"):
        LLM("anything", max_seqs=4)
    with pytest.raises(SetupError, match="no model"):
        LLM("/nowhere/at/all")


def test_a_shared_beginning_is_computed_once(llm: LLM) -> None:
    beginning = random_prompt(7, 64)
    prompts = [beginning + random_prompt(i, 9) for i in range(4)]
    results = llm.generate(prompts, GREEDY)
    assert [result.num_cached_tokens for result in results] == [0, 64, 64, 64]
    assert llm.generate(prompts, GREEDY) == results


def test_a_thousand_prompts_wait_for_a_seat_and_get_one(llm: LLM) -> None:
    prompts = [[1 + i % 300, i // 300] for i in range(1000)]
    results = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
    assert [result.prompt_token_ids for result in results] == prompts
    assert all(len(result.outputs[0].token_ids) == 2 for result in results)
    assert results[700:703] == llm.generate(
        prompts[700:703], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    )


def test_no_choices_at_all_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="n is 0"):
        llm.generate([1, 2], SamplingParams(n=0))


@pytest.mark.model
def test_the_next_turn_of_a_chat_reuses_the_last_one(smollm: LLM) -> None:
    chat = [{"role": "user", "content": "Write three sentences about the sea."}]
    params = SamplingParams(temperature=0.0, max_tokens=80)
    [first] = smollm.chat(chat, params)
    answer = first.outputs[0]
    chat += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "And now about mountains."}]
    [second] = smollm.chat(chat, params)
    # The text may become other tokens where answer and template meet, so not all of it need be found.
    assert second.num_cached_tokens >= len(first.prompt_token_ids) + len(answer.token_ids) - 32
    smollm.engine.close()
    fresh = SequenceRequest(
        id="uncached",
        prompt=second.prompt_token_ids,
        sampling=params,
        stop_ids=smollm.tokenizer.stop_ids,
        cache_salt=None,
    )
    assert run(smollm.engine, fresh)["uncached"].tokens == second.outputs[0].token_ids


@pytest.mark.model
def test_text_goes_in_and_comes_out(smollm: LLM) -> None:
    [result] = smollm.generate("The capital of France is", GREEDY)
    assert result.prompt == "The capital of France is"
    assert "Paris" in result.outputs[0].text
    assert smollm.tokenizer.decode(result.outputs[0].token_ids) == result.outputs[0].text


@pytest.mark.model
def test_chat_answers_through_the_template(smollm: LLM) -> None:
    questions = [[{"role": "user", "content": f"What is the capital of {land}?"}] for land in ("France", "Italy")]
    params = SamplingParams(temperature=0.0, max_tokens=20)
    france, italy = smollm.chat(questions, params)
    assert "Paris" in france.outputs[0].text and "Rome" in italy.outputs[0].text
    assert france.outputs[0].finish_reason == "stop"
    assert smollm.chat(questions[0], params) == [france]
    with pytest.raises(InvalidRequest, match="messages are not as they should be"):
        smollm.chat([{"content": "no role"}])


@pytest.mark.model
def test_drafts_change_no_text(default_model: ModelFiles, smollm: LLM) -> None:
    drafting = LLM(str(default_model.path), max_num_seqs=8, num_blocks=200, drafter="ngram")
    prompts = ["one two three one two three one two", "def add(a, b):\n    return a + b\n\ndef sub(a, b):", "The sea"]
    params = [
        SamplingParams(temperature=0.0, max_tokens=40, logprobs=1, stop=("four", "\n\n")),
        SamplingParams(temperature=0.4, seed=2, max_tokens=40, frequency_penalty=0.2, stop=("div",)),
        SamplingParams(temperature=0.0, max_tokens=30, repetition_penalty=1.1, min_tokens=10),
    ]
    assert drafting.generate(prompts, params) == smollm.generate(prompts, params)
    assert drafting.engine.load().steps < 40  # each alone would take about that many


@pytest.mark.model
def test_a_stop_string_ends_the_text_before_it(smollm: LLM) -> None:
    [free] = smollm.generate("Count: 1, 2, 3,", SamplingParams(temperature=0.0, max_tokens=12))
    [cut] = smollm.generate("Count: 1, 2, 3,", SamplingParams(temperature=0.0, max_tokens=12, stop=("5,",)))
    assert "5," in free.outputs[0].text
    assert cut.outputs[0].text == free.outputs[0].text.split("5,")[0]
    assert cut.outputs[0].finish_reason == "stop"
    assert len(cut.outputs[0].token_ids) < len(free.outputs[0].token_ids)
    assert not smollm.engine.has_work()


def test_the_benchmark_writes_what_it_measured(
    tiny_model: ModelFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "engine.json"
    arguments = ["--model", str(tiny_model.path), "--concurrency", "1,3", "--input", "10", "--output", "4"]
    bench.main([*arguments, "--json", str(file)])
    result = json.loads(file.read_text())
    assert [row["concurrency"] for row in result["rows"]] == [1, 3]
    assert all(row["output_tok_s"] > 0 and row["tpot_ms_p50"] > 0 for row in result["rows"])
    assert {"model", "device", "dtype", "versions", "rows", "figures"} == set(result)
    assert "streams" in capsys.readouterr().out
