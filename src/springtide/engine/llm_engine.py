"""The engine: schedule, run, sample, update. Token ids in, token ids out; knows no text and no sockets.

`LLMEngine.step` is the whole loop. What to run, the scheduler decides (`springtide.policy.scheduler`); how, the
runner knows (`runner.py`); which token comes next, the sampler (`sampler.py`). Here lie the sequences' token ids
and the rules by which they end.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from springtide.core.engine_api import EngineInfo, EngineLoad, SequenceOutput, SequenceRequest, TokenScore
from springtide.core.errors import ContextTooLong, InvalidRequest
from springtide.core.fetch import Progress, silent
from springtide.core.request import FinishReason
from springtide.core.store import ModelFiles
from springtide.engine import sampler
from springtide.engine.config import EngineConfig
from springtide.engine.jit import have_compiled
from springtide.engine.kv import PAGE_SIZE
from springtide.engine.runner import Chunk, ModelRunner, load_runner, resolve_context_length
from springtide.engine.sampler import SampleError, SampleRow, sample
from springtide.policy.scheduler import Batch, Scheduled, Scheduler


class LLMEngine:
    """`springtide.core.engine_api.Engine` over a model of our own. One thread at a time."""

    def __init__(self, runner: ModelRunner, config: EngineConfig, *, model: str, digest: str) -> None:
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
        self._sequences: dict[str, _Sequence] = {}
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
        runner = load_runner(files, config)
        progress("warming up" if have_compiled() else "compiling kernels (first start only)", 0, None)
        runner.warm_up()
        sampler.warm_up(runner.model.config.vocab_size)
        return cls(runner, config, model=files.name, digest=files.digest)

    def add(self, sequence: SequenceRequest) -> None:
        """Queue a sequence. One whose `output` is already complete just gets its last word from the next step.

        Raises:
            ContextTooLong: prompt and `max_tokens` do not fit the context.
            InvalidRequest: no tokens at all, or a token id that the model does not have.
        """
        assert sequence.id not in self._sequences, f"sequence {sequence.id} is already here"
        _check_token_ids(sequence, self.info.vocab_size)
        added = _Sequence(sequence, self.info.context_length, self.info.vocab_size)
        reason = added.finish_reason()
        if reason is not None:
            self._ended.append(SequenceOutput(id=sequence.id, token_ids=[], finish_reason=reason))
            return
        self._scheduler.add(
            sequence.id,
            num_tokens=len(added.tokens),
            max_num_tokens=len(sequence.prompt) + added.max_tokens,
            priority=sequence.priority,
        )
        self._sequences[sequence.id] = added

    def cancel(self, sequence_id: str) -> None:
        """Forget a sequence and free its pages at once. Unknown ids are ignored; no output follows."""
        self._ended = [output for output in self._ended if output.id != sequence_id]
        self._sequences.pop(sequence_id, None)
        self._scheduler.cancel(sequence_id)
        self._runner.release(sequence_id)

    def has_work(self) -> bool:
        return bool(self._sequences or self._ended)

    def step(self) -> list[SequenceOutput]:
        """Run one batch: what each sequence of it that got so far gained, and who ended."""
        outputs, self._ended = self._ended, []
        batch = self._scheduler.schedule()
        for sequence_id in batch.preempted:
            self._runner.release(sequence_id)
        if batch.items:
            outputs += self._run(batch)
        return outputs

    def load(self) -> EngineLoad:
        return self._scheduler.load()

    def close(self) -> None:
        """Forget all sequences."""
        for sequence_id in list(self._sequences):
            self.cancel(sequence_id)

    def _run(self, batch: Batch) -> list[SequenceOutput]:
        logits = self._runner.run([self._chunk(item) for item in batch.items])
        outputs = self._sample([item.id for item in batch.items if item.samples], logits)
        finished = [output.id for output in outputs if output.finish_reason is not None]
        self._scheduler.update(batch, {output.id: len(output.token_ids) for output in outputs}, finished)
        for sequence_id in finished:
            del self._sequences[sequence_id]
            self._runner.release(sequence_id)
        return outputs

    def _chunk(self, item: Scheduled) -> Chunk:
        tokens = self._sequences[item.id].tokens[item.start : item.start + item.count]
        return Chunk(item.id, item.start, tokens, wants_logits=item.samples)

    def _sample(self, ids: list[str], logits: Tensor) -> list[SequenceOutput]:
        """The next token of each sequence from its row of logits; a row without one ends just its sequence."""
        results = sample(logits.numpy(), [self._sequences[sequence_id].sample_row() for sequence_id in ids])
        return [
            _failed(sequence_id, result) if isinstance(result, SampleError) else self._accept(sequence_id, *result)
            for sequence_id, result in zip(ids, results, strict=True)
        ]

    def _accept(self, sequence_id: str, token: int, score: TokenScore | None) -> SequenceOutput:
        sequence = self._sequences[sequence_id]
        sequence.append(token)
        return SequenceOutput(
            id=sequence_id,
            token_ids=[token],
            scores=None if score is None else [score],
            finish_reason=sequence.finish_reason(),
        )


class _Sequence:
    """A request's token ids as they grow, and the rules by which they end."""

    def __init__(self, request: SequenceRequest, context_length: int, vocab_size: int) -> None:
        sampling = request.sampling
        self.request = request
        self.tokens = [*request.prompt, *request.output]
        self.output = list(request.output)
        self.max_tokens = _max_tokens(request, context_length)
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.ends = frozenset(sampling.stop_token_ids) | (
            # Of a tokenizer that has more tokens than the model, some never come.
            frozenset() if sampling.ignore_eos else {id for id in request.stop_ids if id < vocab_size}
        )

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.output.append(token)

    def finish_reason(self) -> FinishReason | None:
        """Why it is over, if it is."""
        if self.output and self.output[-1] in self.ends:
            return "stop"
        return "length" if len(self.output) >= self.max_tokens else None

    def sample_row(self) -> SampleRow:
        """What the sampler must know to choose the next token."""
        position = len(self.output)
        return SampleRow(
            sampling=self.request.sampling,
            seed=self.seed,
            choice=self.request.choice,
            position=position,
            prompt_ids=self.request.prompt,
            output_ids=self.output,
            banned=self.ends if position < self.request.sampling.min_tokens else frozenset(),
        )


def _max_tokens(request: SequenceRequest, context_length: int) -> int:
    """How many tokens the output may have: as asked for, else as many as the context holds."""
    prompt, asked = len(request.prompt), request.sampling.max_tokens
    if prompt + (asked or 1) > context_length:
        wanted = f"{asked} for the answer" if asked else "none left for the answer"
        raise ContextTooLong(
            f"this model's context holds {context_length} tokens, but {prompt + (asked or 0)} are asked for: "
            f"{prompt} in the prompt and {wanted}",
            hint="shorten the prompt or lower max_tokens",
        )
    return asked or context_length - prompt


def _check_token_ids(request: SequenceRequest, vocab_size: int) -> None:
    if not request.prompt:
        raise InvalidRequest("the prompt has no tokens", param="prompt")
    sampling = request.sampling
    _check_range([*request.prompt, *request.output], vocab_size, "prompt")
    _check_range(sampling.stop_token_ids, vocab_size, "stop_token_ids")
    _check_range(list(sampling.logit_bias), vocab_size, "logit_bias")


def _check_range(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise InvalidRequest(f"token id {wrong} in {param} is outside the vocabulary [0, {vocab_size})", param=param)


def _failed(sequence_id: str, error: SampleError) -> SequenceOutput:
    return SequenceOutput(id=sequence_id, token_ids=[], finish_reason="error", error=error.reason)


def _numerics(runner: ModelRunner, dtype: str, digest: str) -> str:
    """All that decides the bits of a logit: processor features, torch's kernels, ours, dtype and weights; and, where
    it is so, that there is no such class, since rows feel each other."""
    features = torch.backends.cpu.get_cpu_capability().lower()
    kernels = f"torch-{torch.__version__}/{runner.attention.name}"
    varying = "/varying" if runner.varying else ""
    return f"cpu-{features}/{kernels}/{dtype}/{digest.removeprefix('sha256:')[:12]}{varying}"
