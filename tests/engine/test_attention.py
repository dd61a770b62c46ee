"""Every attention backend equals the reference, and a row's bits depend on its own sequence only."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from springtide.core.errors import SetupError
from springtide.engine.attention.base import PAGE_SIZE, AttentionBackend
from springtide.engine.attention.numba_cpu import NumbaAttention
from springtide.engine.attention.reference import ReferenceAttention
from springtide.engine.attention.registry import choose_attention
from springtide.engine.inputs import ForwardInputs
from springtide.engine.models.config import ModelConfig

NUM_LAYERS = 2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of values of order one; bfloat16 steps by 2 ** -8
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@dataclass(frozen=True)
class Shape:
    """(tokens already there, new rows) of each sequence, and the heads they have."""

    sequences: list[tuple[int, int]]
    kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype
    seed: int = 0


@dataclass
class Pages:
    k: Tensor
    v: Tensor


class Story:
    """Sequences whose tokens all have their q, k and v, on pages in disorder among pages of garbage."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(shape.seed)
        heads = (shape.kv_heads * shape.group, shape.kv_heads, shape.kv_heads)
        self.qkv = [
            [torch.randn(start + count, n, shape.head_dim, generator=generator).to(shape.dtype) for n in heads]
            for start, count in shape.sequences
        ]
        pages = max(-(-(start + count) // PAGE_SIZE) for start, count in shape.sequences)
        wanted = len(shape.sequences) * NUM_LAYERS * shape.kv_heads * pages
        order = torch.randperm(wanted + 5, generator=generator)[:wanted].int()
        self.page_table = order.view(len(shape.sequences), NUM_LAYERS, shape.kv_heads, pages)
        garbage = 1e3 * torch.randn(wanted + 5, PAGE_SIZE, shape.head_dim, generator=generator).to(shape.dtype)
        self.pool = Pages(garbage.clone(), garbage.clone())

    def run(self, backend: AttentionBackend, spans: list[tuple[int, int, int]], layer: int = 1) -> Tensor:
        """Attend with rows [start, end) of each named sequence, in one call."""
        q, k, v = (torch.cat([self.qkv[seq][part][start:end] for seq, start, end in spans]) for part in range(3))
        inputs = ForwardInputs(
            token_ids=torch.zeros(len(q), dtype=torch.int64),
            positions=torch.cat([torch.arange(start, end) for _, start, end in spans]),
            row_seq=torch.cat([torch.full((end - start,), seq, dtype=torch.int32) for seq, start, end in spans]),
            page_table=self.page_table,
            logit_rows=torch.zeros(0, dtype=torch.int64),
        )
        return backend.attend(layer, q, k, v, self.pool, inputs, self.shape.head_dim**-0.5)

    def play(self, backend: AttentionBackend) -> Tensor:
        """First what is already there, then the new rows of all sequences in one ragged call."""
        before = [(seq, 0, start) for seq, (start, _) in enumerate(self.shape.sequences) if start]
        if before:
            self.run(backend, before)
        return self.run(
            backend, [(seq, start, start + count) for seq, (start, count) in enumerate(self.shape.sequences)]
        )


shapes = st.builds(
    Shape,
    sequences=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 40)), min_size=1, max_size=5),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 4, 8]),
    head_dim=st.sampled_from([8, 16, 18, 32, 64, 80, 96, 128]),
    dtype=DTYPES,
    seed=st.integers(0, 2**31),
)


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_numba_equals_the_reference(shape: Shape) -> None:
    ours, expected = Story(shape).play(NumbaAttention()), Story(shape).play(ReferenceAttention())
    torch.testing.assert_close(ours, expected, rtol=TOLERANCE[shape.dtype], atol=TOLERANCE[shape.dtype])


@settings(max_examples=25, deadline=None)
@given(shapes, st.integers(1, 30))
def test_chunks_and_company_change_no_bit(shape: Shape, chunk: int) -> None:
    """All rows of all sequences in one call, against each sequence by itself, chunk by chunk."""
    together, apart = Story(shape), Story(shape)
    lengths = [start + count for start, count in shape.sequences]
    whole = together.run(NumbaAttention(), [(seq, 0, length) for seq, length in enumerate(lengths)])
    alone = [
        apart.run(NumbaAttention(), [(seq, start, min(start + chunk, length))])
        for seq, length in enumerate(lengths)
        for start in range(0, length, chunk)
    ]
    assert torch.equal(torch.cat(alone), whole)


def test_decode_rows_of_many_sequences_equal_their_prefill() -> None:
    shape = Shape([(17 * i, 1) for i in range(24)], kv_heads=3, group=3, head_dim=64, dtype=torch.bfloat16)
    decoded = Story(shape).play(NumbaAttention())
    other = Story(shape)
    for seq, (start, _) in enumerate(shape.sequences):
        prefilled = other.run(NumbaAttention(), [(seq, 0, start + 1)])
        assert torch.equal(prefilled[-1], decoded[seq])


@pytest.mark.parametrize("backend", [ReferenceAttention(), NumbaAttention()], ids=lambda backend: backend.name)
def test_scores_far_apart_do_not_overflow(backend: AttentionBackend) -> None:
    story = Story(Shape([(0, 100)], kv_heads=1, group=1, head_dim=16, dtype=torch.float32))
    story.qkv[0][0] *= 1e4
    q, k, v = story.qkv[0]
    attended = story.run(backend, [(0, 0, 100)])
    winners = (q[:, 0] @ k[:, 0].T).masked_fill(torch.ones(100, 100).triu(1).bool(), -torch.inf).argmax(dim=-1)
    torch.testing.assert_close(attended, v[winners])


def test_other_layers_keep_their_pages() -> None:
    story = Story(Shape([(0, 40)], kv_heads=2, group=2, head_dim=16, dtype=torch.float32))
    others = story.page_table[:, 0].flatten().long()
    before = story.pool.k[others].clone()
    story.run(NumbaAttention(), [(0, 0, 40)], layer=1)
    assert torch.equal(story.pool.k[others], before)


def test_a_backend_is_chosen_by_name_and_by_what_it_can_do() -> None:
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=1,
        hidden_size=8,
        intermediate_size=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        vocab_size=8,
        context_length=8,
    )
    assert choose_attention("auto", config, torch.bfloat16).name == "numba"
    assert choose_attention("auto", config, torch.float64).name == "reference"
    assert choose_attention("reference", config, torch.float32).name == "reference"
    with pytest.raises(SetupError, match=r"can't do torch\.float64"):
        choose_attention("numba", config, torch.float64)
    with pytest.raises(SetupError, match="no attention backend 'flash'"):
        choose_attention("flash", config, torch.float32)
