"""What the engine does with sequences: how they end, resume, are cancelled, refused, and fail alone."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import safetensors.torch
import torch

from springtide.core.engine_api import SequenceOutput
from springtide.core.errors import ContextTooLong, InvalidRequest, SetupError
from springtide.core.store import ModelFiles
from springtide.engine import llm_engine, runner
from springtide.engine.attention import numba_cpu
from springtide.engine.config import EngineConfig
from springtide.engine.layer_kernels import rms_norm, silu_and_mul, split_heads
from springtide.engine.llm_engine import LLMEngine
from springtide.engine.loading import plan_memory
from springtide.engine.machine import available_memory, usable_cores
from springtide.engine.models.registry import open_checkpoint
from springtide.engine.sampler_kernels import sample_rows, score_rows
from tests.engine.harness import random_prompt, request, run

VOCAB = 307


@pytest.fixture(scope="module")
def engine(tiny_model: ModelFiles) -> LLMEngine:
    return LLMEngine.from_files(tiny_model, EngineConfig(dtype="float32", num_blocks=64))


@pytest.fixture(autouse=True)
def nothing_stays_behind(engine: LLMEngine) -> Any:
    yield
    engine.close()
    load = engine.load()
    assert (load.running, load.waiting, load.blocks_free) == (0, 0, load.blocks_total)


def test_it_says_what_it_is(engine: LLMEngine) -> None:
    info = engine.info
    assert (info.model, info.engine, info.dtype, info.device) == ("tiny", "springtide", "float32", "cpu")
    assert (info.context_length, info.vocab_size, info.num_blocks, info.block_size) == (512, VOCAB, 64, 16)
    assert "float32" in info.numerics and "000000000000" in info.numerics


def test_a_sequence_ends_at_max_tokens(engine: LLMEngine) -> None:
    result = run(engine, request("a", random_prompt(1, 20), max_tokens=5, ignore_eos=True))["a"]
    assert (len(result.tokens), result.finish_reason) == (5, "length")


def test_outputs_come_one_token_a_step_and_the_reason_with_the_last(engine: LLMEngine) -> None:
    engine.add(request("a", random_prompt(1, 20), max_tokens=3, ignore_eos=True))
    steps = [engine.step() for _ in range(3)]
    assert [len(outputs[0].token_ids) for outputs in steps] == [1, 1, 1]
    assert [outputs[0].finish_reason for outputs in steps] == [None, None, "length"]
    assert not engine.has_work()
    assert engine.step() == []


def test_an_end_token_ends_it_and_is_told(engine: LLMEngine) -> None:
    prompt = random_prompt(2, 20)
    free = run(engine, request("a", prompt, max_tokens=8, temperature=0.0))["a"].tokens
    end = free[3]
    cut = free[: free.index(end) + 1]
    stopped = run(engine, request("a", prompt, stop_ids=(end,), max_tokens=8, temperature=0.0))["a"]
    assert (stopped.tokens, stopped.finish_reason) == (cut, "stop")
    by_id = run(engine, request("a", prompt, max_tokens=8, temperature=0.0, stop_token_ids=(end,), ignore_eos=True))[
        "a"
    ]
    assert (by_id.tokens, by_id.finish_reason) == (cut, "stop")


def test_ignore_eos_runs_on(engine: LLMEngine) -> None:
    prompt = random_prompt(2, 20)
    free = run(engine, request("a", prompt, max_tokens=8, temperature=0.0))["a"].tokens
    ignored = run(engine, request("a", prompt, stop_ids=(free[3],), max_tokens=8, temperature=0.0, ignore_eos=True))[
        "a"
    ]
    assert (ignored.tokens, ignored.finish_reason) == (free, "length")


def test_before_min_tokens_no_end_token_can_come(engine: LLMEngine) -> None:
    prompt = random_prompt(2, 20)
    everything = tuple(range(VOCAB // 2))  # half of all tokens end it: without the ban it would end at once
    for seed in range(5):
        asked = request("a", prompt, stop_ids=everything, max_tokens=40, min_tokens=10, seed=seed)
        result = run(engine, asked)["a"]
        assert not set(result.tokens[:10]) & set(everything)
        assert result.finish_reason == "stop" and len(result.tokens) > 10


def test_the_end_of_the_context_ends_it(engine: LLMEngine) -> None:
    result = run(engine, request("a", random_prompt(1, 500), ignore_eos=True))["a"]
    assert (len(result.tokens), result.finish_reason) == (12, "length")


def test_a_resumed_sequence_goes_on_as_if_nothing_had_happened(engine: LLMEngine) -> None:
    prompt = random_prompt(3, 30)
    settings: dict[str, Any] = {"seed": 7, "max_tokens": 20, "presence_penalty": 0.5, "logprobs": 2}
    whole = run(engine, request("a", prompt, **settings))["a"]
    for done in (1, 2, 10, 19):
        resumed = run(engine, request("a", prompt, output=whole.tokens[:done], **settings))["a"]
        assert resumed.tokens == whole.tokens[done:]
        assert resumed.scores == whole.scores[done:]
        assert resumed.finish_reason == "length"


def test_a_sequence_resumed_after_its_last_token_just_ends(engine: LLMEngine) -> None:
    prompt = random_prompt(3, 30)
    engine.add(request("full", prompt, output=[5, 6, 7], max_tokens=3))
    engine.add(request("stopped", prompt, output=[5, 6, 9], stop_ids=(9,), max_tokens=10))
    engine.add(request("cancelled", prompt, output=[5], max_tokens=1))
    engine.cancel("cancelled")
    assert engine.has_work()
    assert engine.step() == [
        SequenceOutput(id="full", token_ids=[], finish_reason="length"),
        SequenceOutput(id="stopped", token_ids=[], finish_reason="stop"),
    ]
    assert not engine.has_work()


def test_cancel_frees_pages_at_once_and_nothing_follows(engine: LLMEngine) -> None:
    engine.add(request("a", random_prompt(1, 100), max_tokens=50, ignore_eos=True))
    engine.add(request("b", random_prompt(2, 40), max_tokens=50, ignore_eos=True))
    engine.step()
    assert engine.load().blocks_free == 64 - 7 - 3
    engine.cancel("a")
    assert engine.load().blocks_free == 64 - 3
    assert engine.load().running == 1
    assert {output.id for output in engine.step()} == {"b"}
    engine.cancel("a")
    engine.cancel("nobody")


def test_choices_of_one_seed_differ_and_repeat(engine: LLMEngine) -> None:
    prompt = random_prompt(4, 12)
    requests = [request(f"{choice}", prompt, choice=choice, seed=1, max_tokens=12) for choice in range(3)]
    first, second = run(engine, *requests), run(engine, *reversed(requests))
    assert first == second
    assert len({tuple(result.tokens) for result in first.values()}) == 3


def test_without_a_seed_two_runs_differ(engine: LLMEngine) -> None:
    prompt = random_prompt(4, 12)
    runs = {tuple(run(engine, request("a", prompt, max_tokens=12))["a"].tokens) for _ in range(3)}
    assert len(runs) > 1


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ([1] * 512, {}, r"holds 512 tokens, but 512 are asked for: 512 in the prompt"),
        ([1] * 500, {"max_tokens": 13}, r"holds 512 tokens, but 513 are asked for: 500 .* 13 for the answer"),
    ],
)
def test_what_does_not_fit_the_context_is_refused_with_both_numbers(
    engine: LLMEngine, prompt: list[int], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ContextTooLong, match=words):
        engine.add(request("a", prompt, **settings))
    assert not engine.has_work()


@pytest.mark.parametrize(
    ("prompt", "settings", "param"),
    [
        ([], {}, "prompt"),
        ([1, VOCAB], {}, "prompt"),
        ([1, -1], {}, "prompt"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ([1], {"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused(
    engine: LLMEngine, prompt: list[int], settings: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        engine.add(request("a", prompt, **settings))
    assert refused.value.param == param
    assert not engine.has_work()


# ---- one sequence's misfortune


@pytest.fixture(scope="module")
def model_with_a_hole(tiny_model: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """The tiny model with token 300's embedding not a number."""
    folder = tmp_path_factory.mktemp("hole") / "model"
    shutil.copytree(tiny_model.path, folder)
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.embed_tokens.weight"][300] = math.nan
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return ModelFiles(name="hole", source="", path=folder, format="safetensors", digest="sha256:1")


@pytest.mark.parametrize("attention", ["reference", "numba"])
def test_a_sequence_that_breaks_ends_alone_and_leaves_no_trace_in_the_memory(
    model_with_a_hole: ModelFiles, attention: str
) -> None:
    config = EngineConfig(dtype="float32", num_blocks=10, attention=attention)  # so few that pages are used again
    engine = LLMEngine.from_files(model_with_a_hole, config)
    good = [request(f"good {i}", random_prompt(i, 30, below=300), seed=i, max_tokens=6) for i in range(2)]
    expected = run(engine, *good)
    bad = request("bad", [*random_prompt(9, 40, below=300), 300, 5], max_tokens=6)
    for _ in range(3):
        results = run(engine, good[0], bad, good[1])
        broken = results.pop("bad")
        assert (broken.tokens, broken.finish_reason) == ([], "error")
        assert broken.error is not None and "not finite" in broken.error
        assert results == expected


def test_a_sequence_whose_every_token_is_banned_ends_alone(engine: LLMEngine) -> None:
    bad = request("bad", [1, 2], stop_ids=tuple(range(VOCAB)), min_tokens=3, max_tokens=5)
    results = run(engine, bad, request("good", [1, 2], max_tokens=2, ignore_eos=True))
    assert results["bad"].finish_reason == "error"
    assert len(results["good"].tokens) == 2


def test_end_tokens_that_the_model_does_not_have_do_no_harm(engine: LLMEngine) -> None:
    asked = request("a", [1, 2], stop_ids=(VOCAB + 5,), min_tokens=2, max_tokens=3)
    assert run(engine, asked)["a"].finish_reason == "length"


# ---- setting up


def test_it_is_warm_when_it_is_loaded_and_nothing_of_that_stays(
    tiny_model: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def load_so() -> LLMEngine:
        told.clear()
        config = EngineConfig(dtype="float32", num_blocks=1, max_num_seqs=1)
        return LLMEngine.from_files(tiny_model, config, progress=lambda what, done, total: told.append(what))

    compiled: list[Any] = [numba_cpu._attend, rms_norm, silu_and_mul, split_heads, sample_rows, score_rows]
    engine = load_so()
    known = [len(kernel.signatures) for kernel in compiled]
    assert (told[0], told[-1]) == ("loading the model", "warming up")
    load = engine.load()
    assert (load.running, load.steps, load.blocks_free) == (0, 0, 1)
    assert not engine.has_work()
    settings: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_p": 0.9, "logprobs": 3}, {"presence_penalty": 1.0}]
    for sampling in settings:
        assert len(run(engine, request("a", [1, 2, 3], max_tokens=4, ignore_eos=True, **sampling))["a"].tokens) == 4
    assert [len(kernel.signatures) for kernel in compiled] == known, "a request found something not compiled"

    monkeypatch.setattr(llm_engine, "have_compiled", lambda: False)
    load_so()
    assert (told[0], told[-1]) == ("loading the model", "compiling kernels (first start only)")


def test_a_processor_whose_products_vary_is_told_of(
    tiny_model: ModelFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert load(tiny_model, num_blocks=1).info.numerics.endswith("000000000000")
    assert "same seed" not in caplog.text
    monkeypatch.setattr(runner, "varying_products", lambda products: [name for name in products if name != "qkv"])
    assert load(tiny_model, num_blocks=1).info.numerics.endswith("/varying")
    assert "products of o_proj, gate_up, down_proj, lm_head depend on the rows beside them" in caplog.text


def load(model: ModelFiles, **options: Any) -> LLMEngine:
    return LLMEngine.from_files(model, EngineConfig.from_options(options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context_length": 513}, r"made for 512 tokens"),
        ({"num_blocks": 10**9}, r"the model needs 0\.\d MB and its KV memory [\d,.]+ MB, but only [\d,.]+ MB are free"),
        ({"kv_memory": 100}, r"KV memory may take 0\.0 MB"),
        ({"max_num_seq": 4}, r"unknown engine option max_num_seq \(did you mean max_num_seqs\?\)"),
        ({"max_num_seqs": 0}, r"max_num_seqs is 0"),
        ({"dtype": "float8"}, r"wrong value.*dtype"),
    ],
)
def test_an_option_that_can_not_be_is_refused_in_a_sentence(
    tiny_model: ModelFiles, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(SetupError, match=words):
        load(tiny_model, **options)


def test_a_model_larger_than_the_machine_is_refused_before_it_is_read(tiny_model: ModelFiles) -> None:
    checkpoint = open_checkpoint(tiny_model)
    weights = checkpoint.weight_bytes(torch.float32)
    with pytest.raises(SetupError, match=r"the model needs 0\.\d MB and its KV memory 0\.0 MB"):
        plan_memory(EngineConfig(num_blocks=1), checkpoint.config, torch.float32, weights=weights, available=weights)


def test_the_machine_tells_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_memory() > 2**20
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert usable_cores() >= 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert usable_cores() == 1


def test_the_context_is_what_the_memory_holds(tiny_model: ModelFiles) -> None:
    assert load(tiny_model, num_blocks=3).info.context_length == 48
    assert load(tiny_model, context_length=100).info.context_length == 100


def test_memory_is_for_all_seats_and_no_more(tiny_model: ModelFiles) -> None:
    assert load(tiny_model, max_num_seqs=3, context_length=100).info.num_blocks == 3 * 7
    assert load(tiny_model, max_num_seqs=3, kv_memory=10**6).info.num_blocks == 3 * 32


def test_more_seats_than_rows_still_work(tiny_model: ModelFiles) -> None:
    engine = load(tiny_model, max_num_batched_tokens=2, dtype="float32")
    results = run(engine, *(request(f"{i}", random_prompt(i, 5), max_tokens=3, ignore_eos=True) for i in range(5)))
    assert all(len(result.tokens) == 3 for result in results.values())
