"""Makes a runner out of a model's files: what the machine can do, what memory it takes, then the reading. Knows no
sequences."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from springtide.core.errors import SetupError
from springtide.core.fetch import Progress, silent
from springtide.core.store import ModelFiles
from springtide.engine.attention.registry import choose_attention
from springtide.engine.config import EngineConfig
from springtide.engine.kv import PAGE_SIZE, PagePool, block_bytes
from springtide.engine.machine import available_memory, usable_cores
from springtide.engine.models.config import ModelConfig
from springtide.engine.models.registry import open_checkpoint
from springtide.engine.runner import ModelRunner

log = logging.getLogger(__name__)

_KV_SHARE = 0.25  # of the memory that is free beside the model
_TABLE_ENTRY_BYTES = 4


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a model will take: its weights, and `num_blocks` blocks of KV memory with the page table. In bytes, as is
    `available`: what is free before any of it is taken."""

    weights: int
    num_blocks: int
    kv: int
    available: int

    def __str__(self) -> str:
        return (
            f"the model needs {_megabytes(self.weights)} and its KV memory {_megabytes(self.kv)}; "
            f"{_megabytes(self.available)} are free"
        )


def load_runner(files: ModelFiles, config: EngineConfig, progress: Progress = silent) -> ModelRunner:
    """Read the model and set its KV memory aside. What it will take is told, and must be free, before it is read.

    Raises:
        SetupError: broken files, an option that this model or machine can't do, or not enough memory.
    """
    threads = config.threads or usable_cores()
    torch.set_num_threads(threads)
    dtype = resolve_dtype(config.dtype)
    checkpoint = open_checkpoint(files)
    model_config, weights = checkpoint.config, checkpoint.weight_bytes(dtype)
    plan = plan_memory(config, model_config, dtype, weights=weights, available=available_memory())
    attention = choose_attention(config.attention, model_config, dtype)
    log.info("%s", plan)
    progress(str(plan), 0, None)
    model = checkpoint.load(dtype, torch.device("cpu"), progress)
    pool = PagePool(plan.num_blocks, model_config.num_layers, model_config.num_kv_heads, model_config.head_dim, dtype)
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


def plan_memory(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, *, weights: int, available: int
) -> MemoryPlan:
    """As much KV memory as asked for, or a share of what is free beside the weights, at most what all seats can use.
    `weights` and `available` (without the model loaded) in bytes.

    Raises:
        SetupError: it does not fit.
    """
    block = block_bytes(model.num_layers, model.num_kv_heads, model.head_dim, dtype)
    pages_per_seat = -(-(config.context_length or model.context_length) // PAGE_SIZE)
    num_blocks = _num_blocks(config, block, most=config.max_num_seqs * pages_per_seat, spare=available - weights)
    entries = config.max_num_seqs * model.num_layers * model.num_kv_heads * min(pages_per_seat, num_blocks)
    plan = MemoryPlan(weights, num_blocks, num_blocks * block + entries * _TABLE_ENTRY_BYTES, available)
    if plan.weights + plan.kv > available:
        raise SetupError(
            f"the model needs {_megabytes(weights)} and its KV memory {_megabytes(plan.kv)}, but only "
            f"{_megabytes(available)} are free",
            hint=_what_to_give_up(weights, available, dtype),
        )
    return plan


def _num_blocks(config: EngineConfig, block: int, *, most: int, spare: int) -> int:
    """At least one block, `block` bytes each. `spare` bytes are free beside the weights, less than none where those
    do not fit."""
    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_memory is None and spare < block:
        return 1  # will not fit either
    memory = config.kv_memory if config.kv_memory is not None else int(spare * _KV_SHARE)
    if memory < block:
        raise SetupError(
            f"the KV memory may take {_megabytes(memory)}, but {PAGE_SIZE} tokens take {_megabytes(block)}",
            hint="raise kv_memory, or take a smaller model",
        )
    return min(memory // block, most)


def _what_to_give_up(weights: int, available: int, dtype: torch.dtype) -> str:
    if weights <= available:
        return "lower num_blocks or kv_memory, or max_num_seqs, or take a smaller model"
    return "take a smaller model" if dtype == torch.bfloat16 else "take a smaller model, or dtype=bfloat16"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
