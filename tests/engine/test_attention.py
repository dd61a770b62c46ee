"""Every attention backend equals the reference, and a row's bits depend on its own sequence only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from springtide.core.errors import SetupError
from springtide.engine.attention.base import PAGE_SIZE, AttentionBackend, AttentionLayer
from springtide.engine.attention.numba_cpu import NumbaAttention
from springtide.engine.attention.reference import ReferenceAttention
from springtide.engine.attention.registry import choose_attention
from springtide.engine.inputs import ForwardInputs
from springtide.engine.models.config import LayerConfig, ModelConfig

BACKENDS: list[AttentionBackend] = [ReferenceAttention(), NumbaAttention()]
NUM_LAYERS = 2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of values of order one; bfloat16 steps by 2 ** -8
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@dataclass(frozen=True)
class Shape:
    """(tokens already there, new rows) of each sequence, the heads they have, and how these look back."""

    sequences: list[tuple[int, int]]
    kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype
    window: int | None = None
    sinks: bool = False
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
        self.sinks = 2 * torch.randn(heads[0], generator=generator) if shape.sinks else None

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
        how = AttentionLayer(layer, self.shape.head_dim**-0.5, self.shape.window, self.sinks)
        return backend.attend(how, q, k, v, self.pool, inputs)

    def play(self, backend: AttentionBackend) -> Tensor:
        """First what is already there, then the new rows of all sequences in one ragged call."""
        before = [(seq, 0, start) for seq, (start, _) in enumerate(self.shape.sequences) if start]
        if before:
            self.run(backend, before)
        return self.run(
            backend, [(seq, start, start + count) for seq, (start, count) in enumerate(self.shape.sequences)]
        )

    def lose(self, seq: int, pages: Iterable[int], layer: int = 1) -> None:
        """Another has these pages of a sequence by now, and filled them with NaN."""
        lost = self.page_table[seq, layer][:, list(pages)].flatten().long()
        self.pool.k[lost], self.pool.v[lost] = math.nan, math.nan


shapes = st.builds(
    Shape,
    sequences=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 40)), min_size=1, max_size=5),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 4, 8]),
    head_dim=st.sampled_from([8, 16, 18, 24, 64, 80, 128, 256]),
    dtype=DTYPES,
    window=st.sampled_from([1, 5, 16, 17, 64, 100, None]),
    sinks=st.booleans(),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=60, deadline=None)
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


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("window", [1, 5, 64, None])
def test_windows_and_sinks_equal_transformers(backend: AttentionBackend, sinks: bool, window: int | None) -> None:
    """Its gpt-oss attends with both; a head whose sink is infinitely low has none."""
    shape = Shape([(0, 100)], kv_heads=2, group=3, head_dim=24, dtype=torch.float32, window=window, sinks=sinks)
    story = Story(shape)
    q, k, v = (part.transpose(0, 1)[None] for part in story.qkv[0])
    back = torch.arange(100)[:, None] - torch.arange(100)
    mask = torch.zeros(100, 100).masked_fill((back < 0) | (back >= (window or 100)), -math.inf)
    lowest = torch.full((6,), -math.inf)
    module = SimpleNamespace(
        num_key_value_groups=3, sinks=lowest if story.sinks is None else story.sinks, training=False
    )
    theirs, _ = eager_attention_forward(module, q, k, v, mask, shape.head_dim**-0.5)
    torch.testing.assert_close(story.run(backend, [(0, 0, 100)]), theirs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [1, 16, 17, 50, 128])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_pages_behind_the_window_may_be_gone(backend: AttentionBackend, window: int, dtype: torch.dtype) -> None:
    """Decoding, and prefilling a chunk, read nothing of them: not the pages, nor where they lay."""
    for start, count in ((200, 1), (203, 13)):
        shape = Shape([(start, count)], kv_heads=2, group=3, head_dim=16, dtype=dtype, window=window, sinks=True)
        expected = Story(shape).play(backend)
        story = Story(shape)
        story.run(backend, [(0, 0, start)])
        gone = range(max(start + 1 - window, 0) // PAGE_SIZE)
        story.lose(0, gone)
        story.page_table[0, 1][:, list(gone)] = 2**31 - 1
        assert torch.equal(story.run(backend, [(0, start, start + count)]), expected)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("length", [1, 15, 17, 70])
def test_what_a_former_owner_left_behind_the_last_token_is_not_seen(backend: AttentionBackend, length: int) -> None:
    shape = Shape([(0, length)], kv_heads=2, group=3, head_dim=24, dtype=torch.float32)
    expected = Story(shape).play(backend)
    story = Story(shape)
    story.lose(0, range(story.page_table.shape[-1]))
    assert torch.equal(story.play(backend), expected)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [3, 20, None])
@pytest.mark.parametrize("part", [1, 2], ids=["key", "value"])
def test_a_broken_token_reaches_the_rows_that_see_it_and_no_other(
    backend: AttentionBackend, dtype: torch.dtype, window: int | None, part: int
) -> None:
    """Not even those that go through the pages together with them."""
    shape = Shape([(0, 60)], kv_heads=2, group=2, head_dim=24, dtype=dtype, window=window)
    sound = Story(shape).play(backend)
    broken = Story(shape)
    broken.qkv[0][part][21, 1, 5] = math.nan  # of one kv head
    attended = broken.play(backend)
    seeing = torch.zeros(60, dtype=torch.bool)
    seeing[21 : 21 + window if window else None] = True
    assert attended[seeing][:, 2:].isnan().flatten(1).any(dim=1).all()
    assert torch.equal(attended[:, :2], sound[:, :2])
    assert torch.equal(attended[~seeing], sound[~seeing])


def test_a_window_wider_than_the_sequence_changes_no_bit() -> None:
    shape = Shape([(90, 9), (0, 40)], kv_heads=2, group=3, head_dim=64, dtype=torch.bfloat16)
    assert torch.equal(Story(replace(shape, window=99)).play(NumbaAttention()), Story(shape).play(NumbaAttention()))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_a_sink_above_all_scores_leaves_nothing_and_one_below_takes_nothing(backend: AttentionBackend) -> None:
    shape = Shape([(0, 70)], kv_heads=1, group=2, head_dim=16, dtype=torch.float32)
    story = Story(shape)
    plain = story.play(backend)
    story.sinks = torch.tensor([1e4, -1e4])
    attended = story.play(backend)
    assert attended[:, 0].abs().max() < 1e-30
    torch.testing.assert_close(attended[:, 1], plain[:, 1])


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
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
        layers=(LayerConfig(rope=None),),
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
