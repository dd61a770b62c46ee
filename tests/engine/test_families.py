"""Every family computes what transformers' computes, at every position and token for token; and a row's bits do not
depend on the rows beside it, nor on how its prompt was cut."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from springtide.core.store import ModelFiles
from springtide.engine.attention.reference import ReferenceAttention
from springtide.engine.attention.registry import choose_attention
from springtide.engine.config import EngineConfig
from springtide.engine.inputs import ForwardInputs
from springtide.engine.linear import varying_products
from springtide.engine.llm_engine import LLMEngine
from springtide.engine.models.registry import Model
from tests.engine.checkpoints import all_logits, loaded, pages_for, saved
from tests.engine.families import FAMILIES, VARIANTS, VOCAB, WINDOW
from tests.engine.harness import random_prompt, request, run
from tests.engine.reference import greedy_after

PROMPT = random_prompt(3, 70, below=VOCAB)
LENGTHS = (1, WINDOW + 1, len(PROMPT), 100)
MAX_TOKENS = 24
ROWS = 64

every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture
def files(name: str, folder: Path) -> ModelFiles:
    """The family's model as transformers writes it."""
    return _saved_once(name, folder)


@functools.cache
def _saved_once(name: str, folder: Path) -> ModelFiles:
    return saved(FAMILIES[name](), folder / name)


@pytest.mark.parametrize("name", FAMILIES | VARIANTS)
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    model = (FAMILIES | VARIANTS)[name]()
    with torch.inference_mode():
        theirs = model(torch.tensor([PROMPT])).logits[0]
    ours = loaded(saved(model, tmp_path))
    assert (all_logits(ours, PROMPT) - theirs).abs().max() < 1e-4
    chunked = all_logits(ours, PROMPT, chunk=17, attention=ReferenceAttention())
    assert (chunked - theirs).abs().max() < 1e-4


@every_family
def test_greedy_tokens_equal_transformers(name: str, files: ModelFiles) -> None:
    """Prompts of all lengths together, cut into chunks; a second time too, when what is kept of them serves."""
    engine = LLMEngine.from_files(files, EngineConfig(dtype="float32", max_num_batched_tokens=48, num_blocks=60))
    prompts = [random_prompt(length, length, below=VOCAB) for length in LENGTHS]
    model = FAMILIES[name]()
    for _ in range(2):
        asked = [
            request(f"{i}", prompt, max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
            for i, prompt in enumerate(prompts)
        ]
        results = run(engine, *asked)
        for each in asked:
            answer = results[each.id].tokens
            assert len(answer) == MAX_TOKENS
            assert greedy_after(model, each.prompt, answer) == answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_family
def test_neither_company_nor_chunking_changes_a_bit(files: ModelFiles, dtype: torch.dtype) -> None:
    model = loaded(files, dtype)
    assert varying_products(model.products()) == []
    alone = all_logits(model, PROMPT, dtype=dtype)
    assert alone.isfinite().all()
    for chunk in (1, 3, 16, 33):
        assert torch.equal(all_logits(model, PROMPT, chunk=chunk, dtype=dtype), alone), f"in chunks of {chunk}"
    assert torch.equal(logits_in_company(model, dtype), alone)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_stays_near_float32(name: str, files: ModelFiles) -> None:
    exact = all_logits(loaded(files), PROMPT)
    rounded = all_logits(loaded(files, torch.bfloat16), PROMPT, dtype=torch.bfloat16)
    similarity = torch.nn.functional.cosine_similarity(exact, rounded, dim=-1)
    assert similarity.median() > 0.99  # not of every row: a router may choose another expert


@torch.inference_mode()
def logits_in_company(model: Model, dtype: torch.dtype) -> torch.Tensor:
    """Logits at every position of PROMPT, which runs in chunks of all sizes among seven strangers, 64 rows a step."""
    rng = np.random.default_rng(5)
    prompts = [PROMPT, *(random_prompt(seed, 600, below=VOCAB) for seed in range(10, 17))]
    backend = choose_attention("auto", model.config, dtype)
    pool, page_table = pages_for(model, len(prompts), 600, dtype)
    done, logits = [0] * len(prompts), []
    while done[0] < len(PROMPT):
        mine = min(int(rng.integers(1, 20)), len(PROMPT) - done[0])
        cuts = sorted(rng.choice(np.arange(1, ROWS - mine), len(prompts) - 2, replace=False).tolist())
        counts = [mine, *np.diff([0, *cuts, ROWS - mine]).tolist()]
        order = rng.permutation(len(prompts)).tolist()
        rows = list(itertools.chain(*([sequence] * counts[sequence] for sequence in order)))
        positions = list(itertools.chain(*(range(done[s], done[s] + counts[s]) for s in order)))
        first = rows.index(0)
        inputs = ForwardInputs(
            token_ids=torch.tensor([prompts[s][position] for s, position in zip(rows, positions, strict=True)]),
            positions=torch.tensor(positions),
            row_seq=torch.tensor(rows, dtype=torch.int32),
            page_table=page_table,
            logit_rows=torch.arange(ROWS),
        )
        logits.append(model.logits(model.forward(inputs, pool, backend))[first : first + mine])
        done = [before + count for before, count in zip(done, counts, strict=True)]
    return torch.cat(logits)
