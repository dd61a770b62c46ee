"""Runs chunks of sequences through a model and gives logits. Knows no sampling, no queue and no text."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from springtide.engine.attention.base import AttentionBackend
from springtide.engine.inputs import ForwardInputs
from springtide.engine.kv import PagePool, PageTable
from springtide.engine.linear import varying_products
from springtide.engine.models.registry import Model

_WARM_UP = "(warm-up)"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence that run together; they stand at positions [start, start + len(tokens)).

    new_blocks: those that the sequence has gained since its last chunk, the last ones of its `num_blocks`.
    num_logits: of how many tokens, the last ones, the logits are wanted.
    """

    sequence_id: str
    start: int
    tokens: Sequence[int]
    num_logits: int
    new_blocks: Sequence[int]
    num_blocks: int


class ModelRunner:
    """A model on a device with its KV memory. Runs on whatever thread calls it, one at a time."""

    def __init__(
        self, model: Model, attention: AttentionBackend, pool: PagePool, *, max_num_seqs: int, threads: int
    ) -> None:
        config = model.config
        self.model = model
        self.attention = attention
        self.pool = pool
        self._table = PageTable(max_num_seqs, config.num_layers, config.num_kv_heads)
        self._threads = threads
        self.varying = varying_products(model.products())
        """Products whose rows feel each other on this machine: none, where a seed keeps its promise."""
        self._settled_thread: int | None = None

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute the chunks' K/V; the wanted logits in the order of the chunks, float32 [sum of num_logits, vocab]."""
        self._settle_threads()
        inputs = self._inputs(chunks)
        hidden = self.model.forward(inputs, self.pool, self.attention)
        return self.model.logits(hidden)

    def release(self, sequence_id: str) -> None:
        """Forget where a sequence's pages are. Unknown ids are ignored."""
        self._table.release(sequence_id)

    def warm_up(self) -> None:
        """Run a prompt and the token after it, so that all kernels are compiled and threads are there. To be done
        before any sequence comes: it writes into the first block."""
        try:
            for start, tokens in ((0, [0, 0]), (2, [0])):
                self.run([Chunk(_WARM_UP, start, tokens, num_logits=1, new_blocks=(0,), num_blocks=1)])
        finally:
            self.release(_WARM_UP)

    def _inputs(self, chunks: Sequence[Chunk]) -> ForwardInputs:
        counts = np.array([len(chunk.tokens) for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        num_logits = np.array([chunk.num_logits for chunk in chunks])
        rows = [self._table.append(chunk.sequence_id, chunk.new_blocks, chunk.num_blocks) for chunk in chunks]
        return ForwardInputs(
            token_ids=torch.tensor([token for chunk in chunks for token in chunk.tokens]),
            positions=torch.from_numpy(_ranges(starts, counts)),
            row_seq=torch.from_numpy(np.repeat(np.array(rows, dtype=np.int32), counts)),
            page_table=self._table.tensor,
            logit_rows=torch.from_numpy(_ranges(counts.cumsum() - num_logits, num_logits)),
        )

    def _settle_threads(self) -> None:
        """torch and numba each keep their number of threads per calling thread."""
        import numba  # only now: it reads its settings, which `jit` makes, when it is first imported

        thread = threading.get_ident()
        if thread != self._settled_thread:
            torch.set_num_threads(self._threads)
            numba.set_num_threads(min(self._threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
            self._settled_thread = thread


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """All of [start, start + count) for each pair, one behind the other."""
    ends = counts.cumsum()
    ranges: np.ndarray = np.arange(counts.sum()) + np.repeat(starts - (ends - counts), counts)
    return ranges
