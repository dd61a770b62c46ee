"""Which tokens run next. Counts tokens and blocks; knows nothing of tensors, token ids, clocks or sockets.

There is no prefill phase and no decode phase: each step moves `num_computed_tokens` of every sequence towards its
`num_tokens`. A step has four parts, each in order of rank (higher priority first, then who came first):

1. *Grow.* A running sequence whose newest token opens a block takes one. If none is free, the running sequence
   of the lowest rank gives up all of its own (it is preempted, and later recomputed from its tokens).
2. *Admit.* Waiting sequences become running while there is a seat, and blocks for all of their tokens. Nobody
   overtakes here: one that does not fit yet holds up those behind it, so the big ones are not starved. A
   sequence may push out running ones of a lower priority.
3. *Grant.* The step's budget divided by the seats is everybody's even share; whoever has no more than that
   pending (a new token, or a few) gets it all. Of the rest the first sequence that has more gets at least half,
   and the shortest of the others what is left. So a long prompt holds up nobody for long, and nobody can hold it
   up.
4. *Update*, after the model has run: new tokens are counted, finished sequences give their blocks back.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from operator import attrgetter

from springtide.core.engine_api import EngineLoad
from springtide.core.errors import InvalidRequest
from springtide.policy.blocks import BlockPool
from springtide.policy.sequence import Sequence

_rank = attrgetter("rank")


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Tokens [start, start + count) of one sequence run in this step."""

    id: str
    start: int
    count: int
    samples: bool  # the last of them is the sequence's newest: the step yields its next token


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step runs, in order of rank; and who lost its memory for it."""

    items: tuple[Scheduled, ...]
    preempted: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(item.count for item in self.items)


class Scheduler:
    """Waiting and running sequences of one replica. One owner drives it: `schedule`, run, `update`.

    At most `max_num_batched_tokens` sequences run at once, whatever `max_num_seqs` says: so each of them can
    have its token in every step.
    """

    def __init__(self, *, max_num_seqs: int, max_num_batched_tokens: int, num_blocks: int, block_size: int) -> None:
        self.max_num_running = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self._even_share = max_num_batched_tokens // self.max_num_running
        self.pool = BlockPool(num_blocks, block_size)
        self.num_steps = 0
        self.num_preemptions = 0
        self._sequences: dict[str, Sequence] = {}
        self._running: list[Sequence] = []  # by rank; these hold blocks
        self._waiting: list[Sequence] = []  # by rank; these hold none
        self._arrivals = 0

    def add(self, sequence_id: str, *, num_tokens: int, max_num_tokens: int, priority: int = 0) -> None:
        """Queue a sequence that has `num_tokens` tokens (a prompt, and on resume its output so far) and may grow
        to `max_num_tokens`. Of two sequences the one with the higher `priority` goes first.

        Raises:
            InvalidRequest: the whole pool could not hold it.
        """
        assert sequence_id not in self._sequences, f"sequence {sequence_id} is already here"
        assert 0 < num_tokens <= max_num_tokens
        room = self.pool.num_blocks * self.pool.block_size
        if max_num_tokens > room:
            raise InvalidRequest(
                f"the sequence may grow to {max_num_tokens} tokens, but the KV memory here holds {room}",
                hint=f"prompt and max_tokens together must be at most {room}",
            )
        sequence = Sequence(sequence_id, priority, self._arrivals, num_tokens, max_num_tokens)
        self._arrivals += 1
        self._sequences[sequence_id] = sequence
        insort(self._waiting, sequence, key=_rank)

    def cancel(self, sequence_id: str) -> None:
        """Forget a sequence and free its blocks at once; unknown ids are ignored. Allowed between `schedule`
        and `update` too."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is None:
            return
        if sequence.num_blocks:
            self._remove(self._running, sequence)
            self._free(sequence)
        else:
            self._remove(self._waiting, sequence)

    def schedule(self) -> Batch:
        """Decide one step. The batch is empty only if there is no sequence at all."""
        preempted = self._grow()
        preempted += self._admit()
        return Batch(tuple(self._grant()), tuple(preempted))

    def update(self, batch: Batch, new_tokens: Mapping[str, int], finished: Collection[str] = ()) -> None:
        """Take in what a step did: how many tokens each sequence gained, and which sequences are over."""
        self.num_steps += 1
        for item in batch.items:
            sequence = self._sequences.get(item.id)
            if sequence is None:  # cancelled meanwhile
                continue
            sequence.num_computed_tokens += item.count
            sequence.num_tokens += new_tokens.get(item.id, 0)
        for sequence_id in finished:
            self.cancel(sequence_id)

    def quiet_steps(self) -> int:
        """How many steps will pass in which nothing happens but that every running sequence gains one token: none
        is admitted, preempted, or reaches its `max_num_tokens`. To be asked between steps; 0 if not so."""
        if not self._running or any(sequence.num_pending_tokens != 1 for sequence in self._running):
            return 0
        if self._waiting and self._can_admit(self._waiting[0]):
            return 0
        until_end = min(sequence.max_num_tokens - sequence.num_tokens for sequence in self._running) - 1
        return max(0, self._steps_with_blocks(until_end))

    def advance(self, steps: int) -> None:
        """Take `steps` steps at once, at most `quiet_steps()`, each yielding one token for every running one."""
        assert 0 <= steps <= self.quiet_steps()
        if steps == 0:
            return
        for sequence in self._running:
            sequence.num_tokens += steps
            sequence.num_computed_tokens += steps
            # The newest token has not run yet: its block is taken by the step that runs it.
            self._take_blocks_for(sequence, sequence.num_computed_tokens)
        self.num_steps += steps

    def has_work(self) -> bool:
        return bool(self._sequences)

    def load(self) -> EngineLoad:
        """How full it is, as replicas report it."""
        return EngineLoad(
            running=len(self._running),
            waiting=len(self._waiting),
            blocks_free=self.pool.num_free,
            blocks_total=self.pool.num_blocks,
            steps=self.num_steps,
            preemptions=self.num_preemptions,
        )

    def _grow(self) -> list[str]:
        """A block for every running sequence that has outgrown its own; the ids of those preempted for it."""
        preempted: list[str] = []
        for sequence in tuple(self._running):
            while sequence.num_blocks and self._missing_blocks(sequence) > self.pool.num_free:
                preempted.append(self._preempt_last())
            if sequence.num_blocks:
                self._take_blocks_for(sequence, sequence.num_tokens)
        return preempted

    def _admit(self) -> list[str]:
        """Start waiting sequences while they fit; the ids of those pushed out for them."""
        preempted: list[str] = []
        while self._waiting and self._can_admit(self._waiting[0]):
            sequence = self._waiting[0]
            while not self._fits(sequence, self.pool.num_free, len(self._running)):
                preempted.append(self._preempt_last())
            self._remove(self._waiting, sequence)
            insort(self._running, sequence, key=_rank)
            self._take_blocks_for(sequence, sequence.num_tokens)
        return preempted

    def _can_admit(self, sequence: Sequence) -> bool:
        """Whether it fits once every running sequence of a lower priority is pushed out."""
        lower = [other for other in self._running if other.priority < sequence.priority]
        free = self.pool.num_free + sum(other.num_blocks for other in lower)
        return self._fits(sequence, free, len(self._running) - len(lower))

    def _fits(self, sequence: Sequence, num_free: int, num_running: int) -> bool:
        # A free block is kept for each one already running: else the next tokens would preempt at once.
        needed = self.pool.blocks_for(sequence.num_tokens) + num_running
        return num_running < self.max_num_running and needed <= num_free

    def _grant(self) -> list[Scheduled]:
        """Share the step's budget out, see the module's head."""
        pending = {sequence.id: sequence.num_pending_tokens for sequence in self._running}
        grants = {sequence_id: count for sequence_id, count in pending.items() if count <= self._even_share}
        left = self.max_num_batched_tokens - sum(grants.values())
        if behind := [sequence for sequence in self._running if sequence.id not in grants]:
            first, *others = behind
            half = min(pending[first.id], left - left // 2)
            left -= half
            for sequence in sorted(others, key=lambda other: (-other.priority, pending[other.id])):
                grants[sequence.id] = min(pending[sequence.id], left)
                left -= grants[sequence.id]
            grants[first.id] = half + min(pending[first.id] - half, left)
        return [self._scheduled(sequence, grants[sequence.id]) for sequence in self._running if grants[sequence.id]]

    @staticmethod
    def _scheduled(sequence: Sequence, count: int) -> Scheduled:
        start = sequence.num_computed_tokens
        return Scheduled(sequence.id, start, count, samples=count == sequence.num_pending_tokens)

    def _preempt_last(self) -> str:
        """Take all blocks of the running sequence of the lowest rank; it waits, at its rank, to be recomputed."""
        victim = self._running.pop()
        self._free(victim)
        victim.num_computed_tokens = 0
        insort(self._waiting, victim, key=_rank)
        self.num_preemptions += 1
        return victim.id

    def _steps_with_blocks(self, most: int) -> int:
        """The largest number of steps, up to `most`, that the free blocks allow when each adds a token to all."""
        # The k-th step needs room for num_tokens + k - 1 tokens. bisect finds the first k that is one too many.
        return bisect_left(range(most), True, key=lambda k: self._blocks_to_reach(k) > self.pool.num_free)

    def _blocks_to_reach(self, steps: int) -> int:
        return sum(self.pool.blocks_for(s.num_tokens + steps) - s.num_blocks for s in self._running)

    def _missing_blocks(self, sequence: Sequence) -> int:
        return self.pool.blocks_for(sequence.num_tokens) - sequence.num_blocks

    def _take_blocks_for(self, sequence: Sequence, num_tokens: int) -> None:
        missing = max(0, self.pool.blocks_for(num_tokens) - sequence.num_blocks)
        self.pool.take(missing)
        sequence.num_blocks += missing

    def _free(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.num_blocks)
        sequence.num_blocks = 0

    @staticmethod
    def _remove(ranked: list[Sequence], sequence: Sequence) -> None:
        index = bisect_left(ranked, sequence.rank, key=_rank)
        assert ranked[index] is sequence
        del ranked[index]
