"""Runs chunks of sequences through a model and gives logits. Knows no sampling, no queue and no text."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from springtide.core.errors import SetupError
from springtide.core.store import ModelFiles
from springtide.engine.attention.base import AttentionBackend
from springtide.engine.attention.registry import choose_attention
from springtide.engine.config import EngineConfig
from springtide.engine.inputs import ForwardInputs
from springtide.engine.kv import PAGE_SIZE, PagePool, PageTable, block_bytes
from springtide.engine.linear import varying_products
from springtide.engine.machine import available_memory, usable_cores
from springtide.engine.models.config import ModelConfig
from springtide.engine.models.registry import Model, load_model, weight_bytes

log = logging.getLogger(__name__)

_WARM_UP = "(warm-up)"
_KV_SHARE = 0.25  # of the memory that is free beside the model


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence that run together; they stand at positions [start, start + len(tokens))."""

    sequence_id: str
    start: int
    tokens: Sequence[int]
    wants_logits: bool  # of the last token


class ModelRunner:
    """A model on a device with its KV memory. Runs on whatever thread calls it, one at a time."""

    def __init__(
        self, model: Model, attention: AttentionBackend, pool: PagePool, *, max_num_seqs: int, threads: int
    ) -> None:
        config = model.config
        self.model = model
        self.attention = attention
        self.pool = pool
        self._table = PageTable(pool.num_blocks, max_num_seqs, config.num_layers, config.num_kv_heads)
        self._threads = threads
        self.varying = varying_products(model.products())
        """Products whose rows feel each other on this machine: none, where a seed keeps its promise."""
        self._settled_thread: int | None = None

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute the chunks' K/V; the logits of those that want them, float32 [wanting chunks, vocab]."""
        self._settle_threads()
        inputs = self._inputs(chunks)
        hidden = self.model.forward(inputs, self.pool, self.attention)
        return self.model.logits(hidden)

    def release(self, sequence_id: str) -> None:
        """Give a sequence's pages back. Unknown ids are ignored."""
        self._table.release(sequence_id)

    def warm_up(self) -> None:
        """Run a prompt and the token after it, so that all kernels are compiled and threads are there. No page stays
        taken."""
        try:
            for start, tokens in ((0, [0, 0]), (2, [0])):
                self.run([Chunk(_WARM_UP, start, tokens, wants_logits=True)])
        finally:
            self.release(_WARM_UP)

    def _inputs(self, chunks: Sequence[Chunk]) -> ForwardInputs:
        counts = np.array([len(chunk.tokens) for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        ends = counts.cumsum()
        rows = [self._table.extend(chunk.sequence_id, chunk.start + len(chunk.tokens)) for chunk in chunks]
        wanted = np.array([chunk.wants_logits for chunk in chunks])
        return ForwardInputs(
            token_ids=torch.tensor([token for chunk in chunks for token in chunk.tokens]),
            positions=torch.from_numpy(np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)),
            row_seq=torch.from_numpy(np.repeat(np.array(rows, dtype=np.int32), counts)),
            page_table=self._table.tensor,
            logit_rows=torch.from_numpy(ends[wanted] - 1),
        )

    def _settle_threads(self) -> None:
        """torch and numba each keep their number of threads per calling thread."""
        import numba  # only now: it reads its settings, which `jit` makes, when it is first imported

        thread = threading.get_ident()
        if thread != self._settled_thread:
            torch.set_num_threads(self._threads)
            numba.set_num_threads(min(self._threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
            self._settled_thread = thread


def load_runner(files: ModelFiles, config: EngineConfig) -> ModelRunner:
    """Read the model and set its KV memory aside.

    Raises:
        SetupError: broken files, an option that this model or machine can't do, or not enough memory.
    """
    threads = config.threads or usable_cores()
    torch.set_num_threads(threads)
    dtype = resolve_dtype(config.dtype)
    available, weights = available_memory(), weight_bytes(files, dtype)
    if weights > available:
        raise SetupError(
            f"the model needs {_megabytes(weights)} in {dtype}, but only {_megabytes(available)} are free",
            hint="take a smaller model, or dtype=bfloat16",
        )
    model, model_config = load_model(files, dtype, torch.device("cpu"))
    num_blocks = plan_num_blocks(config, model_config, dtype, weights=weights, available=available)
    pool = PagePool(num_blocks, model_config.num_layers, model_config.num_kv_heads, model_config.head_dim, dtype)
    attention = choose_attention(config.attention, model_config, dtype)
    runner = ModelRunner(model, attention, pool, max_num_seqs=config.max_num_seqs, threads=threads)
    if runner.varying:
        log.warning(
            "on this processor the %s products of %s depend on the rows beside them: the same seed may give another "
            "text in other company",
            str(dtype).removeprefix("torch."),
            ", ".join(runner.varying),
        )
    return runner


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype of an option; "auto" is bfloat16 where the processor multiplies it natively."""
    if name == "auto":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def resolve_context_length(config: EngineConfig, model: ModelConfig, num_blocks: int) -> int:
    """Tokens that one sequence may have: what is asked for, by default the model's own, and what the pool holds.

    Raises:
        SetupError: more is asked for than the model can.
    """
    wanted = config.context_length or model.context_length
    if wanted > model.context_length:
        raise SetupError(
            f"context_length is {wanted}, but the model was made for {model.context_length} tokens",
            hint=f"set it to at most {model.context_length}",
        )
    room = num_blocks * PAGE_SIZE
    if room < wanted:
        log.warning("the KV memory holds %d tokens, so the context is cut from %d to that", room, wanted)
    return min(wanted, room)


def plan_num_blocks(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, *, weights: int, available: int
) -> int:
    """Blocks of KV memory: as asked for, or a share of what is free beside the weights, at most what all seats can
    use. `weights` and `available` (without the model loaded) in bytes.

    Raises:
        SetupError: it does not fit.
    """
    size = block_bytes(model.num_layers, model.num_kv_heads, model.head_dim, dtype)
    context = config.context_length or model.context_length
    useful = config.max_num_seqs * -(-context // PAGE_SIZE)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    else:
        memory = config.kv_memory if config.kv_memory is not None else int((available - weights) * _KV_SHARE)
        num_blocks = min(memory // size, useful)
    if num_blocks < 1:
        raise SetupError(
            f"the KV memory may take {_megabytes(memory)}, but 16 tokens take {_megabytes(size)}",
            hint="raise kv_memory, or take a smaller model",
        )
    if weights + num_blocks * size > available:
        raise SetupError(
            f"the model needs {_megabytes(weights)} and its KV memory {_megabytes(num_blocks * size)}, but only "
            f"{_megabytes(available)} are free",
            hint="lower num_blocks or kv_memory, or take a smaller model",
        )
    return num_blocks


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
