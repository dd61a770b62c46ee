"""The engine: draft, schedule, run, sample, update. Token ids in, token ids out; knows no text and no sockets.

`LLMEngine.step` is the whole loop. What may come next, a drafter guesses (`drafting/`); what to run, the scheduler
decides (`springtide.policy.scheduler`); how, the runner knows (`runner.py`); which token comes next, the sampler
(`sampler.py`). The sequences' token ids, and the rules by which they end, lie in `sequence.py`.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor

from springtide.core.engine_api import EngineInfo, EngineLoad, SequenceOutput, SequenceRequest, TokenScore
from springtide.core.errors import InvalidRequest
from springtide.core.fetch import Progress, silent
from springtide.core.store import ModelFiles
from springtide.engine import sampler
from springtide.engine.config import EngineConfig
from springtide.engine.drafting.base import Drafter
from springtide.engine.drafting.registry import choose_drafter
from springtide.engine.jit import have_compiled
from springtide.engine.kv import PAGE_SIZE
from springtide.engine.kv_policy import choose_kv_policy
from springtide.engine.loading import load_runner, resolve_context_length
from springtide.engine.runner import Chunk, ModelRunner
from springtide.engine.sampler import SampleError, SampleResult, sample
from springtide.engine.sequence import Sequence
from springtide.policy.scheduler import Batch, Scheduled, Scheduler


class LLMEngine:
    """`springtide.core.engine_api.Engine` over a model of our own. One thread at a time."""

    def __init__(
        self, runner: ModelRunner, config: EngineConfig, drafter: Drafter | None, *, model: str, digest: str
    ) -> None:
        model_config = runner.model.config
        num_blocks = runner.pool.num_blocks
        dtype = str(runner.pool.k.dtype).removeprefix("torch.")
        self.info = EngineInfo(
            model=model,
            engine="springtide",
            context_length=resolve_context_length(config, model_config, num_blocks),
            vocab_size=model_config.vocab_size,
            block_size=PAGE_SIZE,
            num_blocks=num_blocks,
            max_num_seqs=config.max_num_seqs,
            dtype=dtype,
            device="cpu",
            numerics=_numerics(runner, dtype, digest),
        )
        self._runner = runner
        self._scheduler = Scheduler(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            num_blocks=num_blocks,
            block_size=PAGE_SIZE,
        )
        self._drafter = drafter
        self._draft_tokens = config.draft_tokens
        self._kv_policy = choose_kv_policy(model_config)
        self._sequences: dict[str, Sequence] = {}
        self._ended: list[SequenceOutput] = []  # over before they began; told by the next step

    @classmethod
    def from_files(
        cls, files: ModelFiles, config: EngineConfig | None = None, *, progress: Progress = silent
    ) -> LLMEngine:
        """Load a model and warm it up: the first request finds everything compiled.

        Raises:
            SetupError: broken files, an option that can't be done, not enough memory.
        """
        config = config or EngineConfig()
        progress("loading the model", 0, None)
        runner = load_runner(files, config, progress)
        progress("warming up" if have_compiled() else "compiling kernels (first start only)", 0, None)
        runner.warm_up()
        sampler.warm_up(runner.model.config.vocab_size)
        return cls(runner, config, choose_drafter(config.drafter), model=files.name, digest=files.digest)

    def add(self, sequence: SequenceRequest) -> None:
        """Queue a sequence. One whose `output` is already complete just gets its last word from the next step.

        Raises:
            ContextTooLong: prompt and `max_tokens` do not fit the context.
            InvalidRequest: no tokens at all, or a token id that the model does not have.
        """
        assert sequence.id not in self._sequences, f"sequence {sequence.id} is already here"
        _check_token_ids(sequence, self.info.vocab_size)
        added = Sequence(sequence, self.info.context_length, self.info.vocab_size)
        reason = added.finish_reason()
        if reason is not None:
            self._ended.append(SequenceOutput(id=sequence.id, token_ids=[], finish_reason=reason))
            return
        self._scheduler.add(
            sequence.id,
            num_tokens=len(added.tokens),
            max_num_tokens=len(sequence.prompt) + added.max_tokens,
            priority=sequence.priority,
            block_hashes=added.block_hashes,
        )
        self._sequences[sequence.id] = added

    def cancel(self, sequence_id: str) -> None:
        """Forget a sequence and free its pages at once. Unknown ids are ignored; no output follows."""
        self._ended = [output for output in self._ended if output.id != sequence_id]
        self._scheduler.cancel(sequence_id)
        self._forget(sequence_id)

    def has_work(self) -> bool:
        return bool(self._sequences or self._ended)

    def step(self) -> list[SequenceOutput]:
        """Run one batch: what each sequence of it that got so far gained, and who ended."""
        outputs, self._ended = self._ended, []
        drafts = self._draft()
        batch = self._scheduler.schedule({sequence_id: len(tokens) for sequence_id, tokens in drafts.items()})
        for sequence_id in batch.preempted:
            self._runner.release(sequence_id)
        if batch.items:
            outputs += self._run(batch, drafts)
        return outputs

    def load(self) -> EngineLoad:
        return self._scheduler.load()

    def close(self) -> None:
        """Forget all sequences."""
        self._ended.clear()
        for sequence_id in list(self._sequences):
            self.cancel(sequence_id)

    def _draft(self) -> dict[str, list[int]]:
        """What may follow the newest token of each sequence that has nothing else to run."""
        drafter = self._drafter
        if drafter is None:
            return {}
        return {
            sequence_id: drafter.propose(sequence_id, self._sequences[sequence_id].tokens, self._draft_tokens)
            for sequence_id in self._scheduler.can_draft()
        }

    def _run(self, batch: Batch, offered: Mapping[str, list[int]]) -> list[SequenceOutput]:
        drafts = {item.id: offered[item.id][: item.num_drafts] if item.num_drafts else [] for item in batch.items}
        logits = self._runner.run([self._chunk(item, drafts[item.id]) for item in batch.items])
        outputs = self._sample({item.id: drafts[item.id] for item in batch.items if item.samples}, logits)
        finished = [output.id for output in outputs if output.finish_reason is not None]
        self._scheduler.update(batch, {output.id: len(output.token_ids) for output in outputs}, finished)
        for sequence_id in finished:
            self._forget(sequence_id)
        self._release_blocks(batch)
        return outputs

    def _chunk(self, item: Scheduled, drafts: list[int]) -> Chunk:
        sequence = self._sequences[item.id]
        sequence.runs_from(item.start)
        return Chunk(
            item.id,
            item.start,
            sequence.tokens[item.start : item.start + item.count - len(drafts)] + drafts,
            num_logits=1 + len(drafts) if item.samples else 0,
            new_blocks=item.new_blocks,
            num_blocks=item.num_blocks,
        )

    def _sample(self, drafts: Mapping[str, list[int]], logits: Tensor) -> list[SequenceOutput]:
        """What each of the sequences in `drafts` gains: it has a row of logits for its newest token, and one for
        each of its drafts."""
        rows = [row for sequence_id, ahead in drafts.items() for row in self._sequences[sequence_id].sample_rows(ahead)]
        results = iter(sample(logits.numpy(), rows))
        return [_accept(self._sequences[sequence_id], ahead, results) for sequence_id, ahead in drafts.items()]

    def _release_blocks(self, batch: Batch) -> None:
        """Let go of what the KV policy says nobody will read again."""
        for item in batch.items:
            if item.id in self._sequences:
                tokens = self._sequences[item.id].tokens
                next_position = len(tokens) - 1 if item.samples else item.start + item.count
                if count := self._kv_policy.blocks_to_release(next_position):
                    self._scheduler.release_blocks(item.id, count)

    def _forget(self, sequence_id: str) -> None:
        """Leave no trace of a sequence beside the scheduler's."""
        self._sequences.pop(sequence_id, None)
        self._runner.release(sequence_id)
        if self._drafter is not None:
            self._drafter.forget(sequence_id)


def _accept(sequence: Sequence, drafts: list[int], results: Iterator[SampleResult]) -> SequenceOutput:
    """Take what was sampled as long as the drafts foretold it, and then the first token that they did not: each
    row was sampled just as it would have been without drafts, so the tokens are the same ones."""
    output = SequenceOutput(id=sequence.request.id, token_ids=[])
    if not sequence.num_gained:
        output.cached_tokens = sequence.cached_tokens or 0
    scores: list[TokenScore] = []
    for draft, result in zip([*drafts, None], list(islice(results, len(drafts) + 1)), strict=True):
        if isinstance(result, SampleError):
            if not output.token_ids:  # else it is told when its row comes first
                output.finish_reason, output.error = "error", result.reason
            break
        token, score = result
        sequence.append(token)
        output.token_ids.append(token)
        scores += [] if score is None else [score]
        output.finish_reason = sequence.finish_reason()
        if token != draft or output.finish_reason is not None:
            break
    output.scores = scores or None
    return output


def _check_token_ids(request: SequenceRequest, vocab_size: int) -> None:
    if not request.prompt:
        raise InvalidRequest("the prompt has no tokens", param="prompt")
    sampling = request.sampling
    _check_range([*request.prompt, *request.output], vocab_size, "prompt")
    _check_range(sampling.stop_token_ids, vocab_size, "stop_token_ids")
    _check_range(list(sampling.logit_bias), vocab_size, "logit_bias")


def _check_range(token_ids: abc.Sequence[int], vocab_size: int, param: str) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise InvalidRequest(f"token id {wrong} in {param} is outside the vocabulary [0, {vocab_size})", param=param)


def _numerics(runner: ModelRunner, dtype: str, digest: str) -> str:
    """All that decides the bits of a logit: processor features, torch's kernels, ours, dtype and weights; and, where
    it is so, that there is no such class, since rows feel each other."""
    features = torch.backends.cpu.get_cpu_capability().lower()
    kernels = f"torch-{torch.__version__}/{runner.attention.name}"
    varying = "/varying" if runner.varying else ""
    return f"cpu-{features}/{kernels}/{dtype}/{digest.removeprefix('sha256:')[:12]}{varying}"
