"""Which tokens run next, and in which blocks. Counts tokens and blocks; knows nothing of tensors, token ids, clocks
or sockets.

There is no prefill phase and no decode phase: each step moves `num_computed_tokens` of every sequence towards its
`num_tokens`. A step has four parts, each in order of rank (higher priority first, then who came first):

1. *Grow.* A running sequence whose newest token opens a block takes one. If none is free, the running sequence
   of the lowest rank gives up all of its own (it is preempted, and later recomputed from its tokens, less what the
   prefix cache still has of them).
2. *Admit.* Waiting sequences become running while there is a seat, and blocks for all of their tokens; those of the
   longest cached prefix they share. Nobody overtakes here: one that does not fit yet holds up those behind it, so
   the big ones are not starved. A sequence may push out running ones of a lower priority. One that would compute
   what a sequence before it is just computing waits for that, and keeps its place and its memory meanwhile.
3. *Grant.* The step's budget divided by the seats is everybody's even share; whoever has no more than that
   pending (a new token, or a few) gets it all. Of the rest the first sequence that has more gets at least half,
   and the shortest of the others what is left. So a long prompt holds up nobody for long, and nobody can hold it
   up. Drafts get what budget and blocks nobody else wanted.
4. *Update*, after the model has run: new tokens are counted, full blocks can be found by their hash from now on,
   rejected drafts and finished sequences give their blocks back.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, abc
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

from springtide.core.engine_api import EngineLoad
from springtide.core.errors import InvalidRequest
from springtide.policy.blocks import BlockPool
from springtide.policy.sequence import Sequence

_rank = attrgetter("rank")


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Tokens [start, start + count) of one sequence run in this step.

    The first time a sequence is in a batch, and again after a preemption, all of its blocks are new, the cached
    ones first, and `start` is how many of its tokens were found cached.
    """

    id: str
    start: int
    count: int
    samples: bool  # its newest token is among them: the step yields its next one
    num_drafts: int = 0  # so many of the last are drafts, behind the newest token
    new_blocks: tuple[int, ...] = ()  # ids of the blocks that its table gained since it was last in a batch
    num_blocks: int = 0  # so many its table has, the new ones last; what lay there (a rejected draft's) is no more


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step runs, in order of rank; and who lost its memory for it."""

    items: tuple[Scheduled, ...]
    preempted: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(item.count for item in self.items)


@dataclass(slots=True)
class _Kept:
    """What is kept free for sequences that could start, but wait for another to compute their prefix."""

    seats: int = 0
    blocks: int = 0


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
        self._slow: set[str] = set()  # got less than a block's worth in the last step, though they have more to run
        self._arrivals = 0

    def add(
        self,
        sequence_id: str,
        *,
        num_tokens: int,
        max_num_tokens: int,
        priority: int = 0,
        block_hashes: abc.Sequence[bytes] | None = None,
    ) -> None:
        """Queue a sequence that has `num_tokens` tokens (a prompt, and on resume its output so far) and may grow
        to `max_num_tokens`. Of two sequences the one with the higher `priority` goes first.

        Args:
            block_hashes: the hashes (`springtide.policy.prefix`) of its full blocks, in order. The list is read as
                it grows: the caller appends to it as tokens fill further blocks, and may do so before they are
                there, if he knows them. None: the sequence neither uses the prefix cache nor leaves anything there.

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
        hashes = () if block_hashes is None else block_hashes
        sequence = Sequence(sequence_id, priority, self._arrivals, num_tokens, max_num_tokens, hashes)
        self._arrivals += 1
        self._sequences[sequence_id] = sequence
        insort(self._waiting, sequence, key=_rank)

    def cancel(self, sequence_id: str) -> None:
        """Forget a sequence and free its blocks at once; unknown ids are ignored. Allowed between `schedule`
        and `update` too."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is None:
            return
        if sequence.blocks:
            self._remove(self._running, sequence)
            self.pool.give_back(sequence.held_blocks)
        else:
            self._remove(self._waiting, sequence)

    def release_blocks(self, sequence_id: str, num_blocks: int) -> None:
        """Let go of a running sequence's first `num_blocks` blocks, which none of its further tokens will read (all
        layers look back over a window only). Its block table keeps its length. Preempted, it is computed anew from
        the start or from what is cached, and takes all blocks again. Allowed between steps; ignored for a sequence
        that does not run.
        """
        sequence = self._sequences.get(sequence_id)
        if sequence is None or not sequence.blocks:
            return
        assert num_blocks * self.pool.block_size <= sequence.num_computed_tokens
        self.pool.give_back(sequence.blocks[sequence.num_released_blocks : num_blocks])
        sequence.num_released_blocks = max(sequence.num_released_blocks, num_blocks)
        sequence.num_registered_blocks = max(sequence.num_registered_blocks, num_blocks)

    def can_draft(self) -> list[str]:
        """The running sequences that it pays to ask for drafts: just their newest token is pending, their next one
        will not be their last, and there is memory for a draft. To be asked between steps."""
        return [s.id for s in self._running if s.num_pending_tokens == 1 and self._num_draftable(s) > 0]

    def schedule(self, drafts: Mapping[str, int] = {}) -> Batch:
        """Decide one step. The batch is empty only if there is no sequence at all.

        Args:
            drafts: how many draft tokens sequences have to offer. They may get to run fewer, or none; one that is
                not running gets none.
        """
        preempted = self._grow()
        self._admit(preempted)
        grants = self._grant()
        num_drafts = self._grant_drafts(grants, drafts) if drafts else {}
        items = [
            self._scheduled(sequence, grants[sequence.id], num_drafts.get(sequence.id, 0))
            for sequence in self._running
            if grants[sequence.id]
        ]
        return Batch(tuple(items), tuple(preempted))

    def update(self, batch: Batch, new_tokens: Mapping[str, int], finished: Collection[str] = ()) -> None:
        """Take in what a step did: how many tokens each sequence gained (of one that ran drafts: those accepted,
        and one more), and which sequences are over."""
        self.num_steps += 1
        for item in batch.items:
            sequence = self._sequences.get(item.id)
            if sequence is None or not sequence.blocks:  # cancelled meanwhile (and its id perhaps added anew)
                continue
            gained = new_tokens.get(item.id, 0)
            accepted = min(item.num_drafts, max(0, gained - 1))
            sequence.num_computed_tokens += item.count - item.num_drafts + accepted
            sequence.num_tokens += gained
            for _ in self._registrable(sequence, sequence.num_computed_tokens):
                self._register_next(sequence)
            if item.num_drafts:
                self._drop_blocks_behind(sequence)
        for sequence_id in finished:
            self.cancel(sequence_id)

    def quiet_steps(self) -> int:
        """How many steps will pass in which nothing happens but that every running sequence gains one token: none
        is admitted, preempted, or reaches its `max_num_tokens`, and nobody drafts. To be asked between steps; 0 if
        not so, or if it can't be told."""
        if not self._running or any(sequence.num_pending_tokens != 1 for sequence in self._running):
            return 0
        if self._waiting and self._may_admit_soon(self._waiting[0]):
            return 0
        until_end = min(sequence.max_num_tokens - sequence.num_tokens for sequence in self._running) - 1
        return max(0, self._steps_with_blocks(until_end))

    def advance(self, steps: int) -> None:
        """Take `steps` steps at once, at most `quiet_steps()`, each yielding one token for every running one.

        Blocks are taken and registered in the order of the single steps. The next batch in which a sequence runs
        names all blocks that it gained; a caller that looks at no blocks (a simulator) need not care.
        """
        assert 0 <= steps <= self.quiet_steps()
        if steps == 0:
            return
        for _, fills, order in self._block_events(steps):
            sequence = self._running[order]
            if fills:
                self._register_next(sequence)
            else:
                sequence.blocks += self.pool.take(1)
        for sequence in self._running:
            sequence.num_tokens += steps
            sequence.num_computed_tokens += steps
        self.num_steps += steps
        self._slow = set()

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

    # ---- grow

    def _grow(self) -> list[str]:
        """A block for every running sequence that has outgrown its own; the ids of those preempted for it."""
        preempted: list[str] = []
        for sequence in tuple(self._running):
            missing = self._missing_blocks(sequence, sequence.num_tokens)
            if not missing:
                continue
            while sequence.blocks and missing > self.pool.num_free:
                preempted.append(self._preempt_last())
            if sequence.blocks:
                sequence.blocks += self.pool.take(missing)
        return preempted

    def _preempt_last(self) -> str:
        """Take all blocks of the running sequence of the lowest rank; it waits, at its rank, to be recomputed."""
        victim = self._running.pop()
        self.pool.give_back(victim.held_blocks)
        victim.lose_memory()
        insort(self._waiting, victim, key=_rank)
        self.num_preemptions += 1
        return victim.id

    # ---- admit

    def _admit(self, preempted: list[str]) -> None:
        """Start waiting sequences while they fit; the ids of those pushed out for them go to `preempted`."""
        kept = _Kept()
        while len(self._waiting) > kept.seats:
            sequence = self._waiting[kept.seats]  # those before it wait for others' computing
            if sequence.id in preempted:  # it might share so much that it fits again, but not in the same step
                return
            cached = self._can_admit(sequence, kept)
            if cached is None:
                return
            if self._is_led(sequence, cached):
                kept.seats += 1
                kept.blocks += self._blocks_needed(sequence, cached)
                continue
            while not self._fits(sequence, cached, kept):
                preempted.append(self._preempt_last())
            self._start(sequence, cached)

    def _can_admit(self, sequence: Sequence, kept: _Kept) -> list[int] | None:
        """The cached blocks that it would start with, if it fits once every running sequence of a lower priority is
        pushed out. While somebody before it waits for others' computing, it can push nobody out."""
        lower = [] if kept.seats else [other for other in self._running if other.priority < sequence.priority]
        if len(self._running) - len(lower) + kept.seats >= self.max_num_running:
            return None
        cached = self.pool.find(self._shareable_hashes(sequence))
        return cached if self._fits(sequence, cached, kept, without=lower) else None

    def _fits(self, sequence: Sequence, cached: list[int], kept: _Kept, without: abc.Sequence[Sequence] = ()) -> bool:
        """Whether there is a seat and memory for it, once the running ones in `without` are gone."""
        leaving = Counter(chain.from_iterable(other.held_blocks for other in without))
        num_free = self.pool.num_free + len(leaving) - self.pool.num_held(leaving, leaving)
        num_running = len(self._running) - len(without) + kept.seats
        # A free block is kept for each one already running: else the next tokens would preempt at once.
        needed = self._blocks_needed(sequence, cached, leaving) + kept.blocks + num_running
        return num_running < self.max_num_running and needed <= num_free

    def _blocks_needed(self, sequence: Sequence, cached: list[int], leaving: Counter[int] | None = None) -> int:
        """Free blocks that it takes to start. Cached ones that nobody holds are free, and count."""
        return self.pool.blocks_for(sequence.num_tokens) - self.pool.num_held(cached, leaving)

    def _shareable_hashes(self, sequence: Sequence) -> abc.Sequence[bytes]:
        """Of the blocks that it may take from the cache: full ones, but not the newest token's, which must run."""
        return sequence.block_hashes[: (sequence.num_tokens - 1) // self.pool.block_size]

    def _is_led(self, sequence: Sequence, cached: list[int]) -> bool:
        """Whether it should wait: a running sequence before it is computing the block that it would compute next,
        and gets on with it. A slow one is not waited for: so each step of waiting saves it a block or ends it."""
        hashes = self._shareable_hashes(sequence)
        if len(cached) == len(hashes):
            return False
        return any(
            self._hash_in_progress(other) == hashes[len(cached)] and other.id not in self._slow
            for other in self._running
            if other.rank < sequence.rank
        )

    def _hash_in_progress(self, sequence: Sequence) -> bytes | None:
        """Of the block that its next token goes to, if it has all tokens of it."""
        index = sequence.num_computed_tokens // self.pool.block_size
        is_full = (index + 1) * self.pool.block_size <= sequence.num_tokens
        return sequence.block_hashes[index] if is_full and index < len(sequence.block_hashes) else None

    def _start(self, sequence: Sequence, cached: list[int]) -> None:
        self._remove(self._waiting, sequence)
        insort(self._running, sequence, key=_rank)
        self.pool.share(cached)
        sequence.blocks = cached + self.pool.take(self.pool.blocks_for(sequence.num_tokens) - len(cached))
        sequence.num_registered_blocks = len(cached)
        sequence.num_computed_tokens = len(cached) * self.pool.block_size

    # ---- grant

    def _grant(self) -> dict[str, int]:
        """Share the step's budget out, see the module's head: how many tokens of each running sequence run."""
        pending = {sequence.id: sequence.num_pending_tokens for sequence in self._running}
        grants = {sequence_id: count for sequence_id, count in pending.items() if count <= self._even_share}
        behind = [sequence for sequence in self._running if sequence.id not in grants]
        left = self.max_num_batched_tokens - sum(grants.values())
        if behind:
            first, *others = behind
            half = min(pending[first.id], left - left // 2)
            left -= half
            for sequence in sorted(others, key=lambda other: (-other.priority, pending[other.id])):
                grants[sequence.id] = min(pending[sequence.id], left)
                left -= grants[sequence.id]
            grants[first.id] = half + min(pending[first.id] - half, left)
        self._slow = {s.id for s in behind if grants[s.id] < min(pending[s.id], self.pool.block_size)}
        return grants

    def _grant_drafts(self, grants: Mapping[str, int], offers: Mapping[str, int]) -> dict[str, int]:
        """How many drafts run behind the newest token of each sequence that runs it; their blocks are taken."""
        left = self.max_num_batched_tokens - sum(grants.values())
        granted: dict[str, int] = {}
        for sequence in self._running:
            if sequence.id in offers and grants[sequence.id] == sequence.num_pending_tokens:
                count = max(0, min(offers[sequence.id], left, self._num_draftable(sequence)))
                sequence.blocks += self.pool.take(self._missing_blocks(sequence, sequence.num_tokens + count))
                granted[sequence.id] = count
                left -= count
        return granted

    def _num_draftable(self, sequence: Sequence) -> int:
        """Drafts that could still be of use (the token after the last of them may be its very last), as far as free
        blocks hold them."""
        useful = sequence.max_num_tokens - 1 - sequence.num_tokens
        room = (len(sequence.blocks) + self.pool.num_free) * self.pool.block_size - sequence.num_tokens
        return min(useful, room)

    @staticmethod
    def _scheduled(sequence: Sequence, count: int, num_drafts: int) -> Scheduled:
        new_blocks = tuple(sequence.blocks[sequence.num_reported_blocks :])
        sequence.num_reported_blocks = len(sequence.blocks)
        return Scheduled(
            sequence.id,
            sequence.num_computed_tokens,
            count + num_drafts,
            count == sequence.num_pending_tokens,
            num_drafts,
            new_blocks,
            len(sequence.blocks),
        )

    # ---- update

    def _registrable(self, sequence: Sequence, num_computed_tokens: int) -> range:
        """Which of its blocks the prefix cache has not been offered yet, but may have when so many tokens are
        computed."""
        full = num_computed_tokens // self.pool.block_size
        return range(sequence.num_registered_blocks, min(full, len(sequence.block_hashes)))

    def _register_next(self, sequence: Sequence) -> None:
        index = sequence.num_registered_blocks
        self.pool.register(sequence.blocks[index], sequence.block_hashes[index])
        sequence.num_registered_blocks += 1

    def _drop_blocks_behind(self, sequence: Sequence) -> None:
        """Give back the blocks that only rejected drafts were in."""
        length = self.pool.blocks_for(sequence.num_tokens)
        self.pool.give_back(sequence.blocks[length:])
        del sequence.blocks[length:]
        sequence.num_reported_blocks = min(sequence.num_reported_blocks, length)

    # ---- many steps at once

    def _may_admit_soon(self, sequence: Sequence) -> bool:
        """Whether the first waiting one fits, or may fit before anybody ends. As long as all others just run, the
        blocks that they compute and it could share are as many as they take; but if they close a gap in what is
        cached of it, it could share at once all that lies behind."""
        if self._can_admit(sequence, _Kept()) is not None:
            return True
        hashes = self._shareable_hashes(sequence)
        return self.pool.num_registered(hashes) > len(self.pool.find(hashes))

    def _steps_with_blocks(self, most: int) -> int:
        """The largest number of steps, up to `most`, that the free blocks allow when each adds a token to all."""
        # The k-th step needs room for num_tokens + k - 1 tokens. bisect finds the first k that is one too many.
        return bisect_left(range(most), True, key=lambda k: self._blocks_to_reach(k) > self.pool.num_free)

    def _blocks_to_reach(self, steps: int) -> int:
        return sum(self._missing_blocks(sequence, sequence.num_tokens + steps) for sequence in self._running)

    def _block_events(self, steps: int) -> list[tuple[int, bool, int]]:
        """What `steps` quiet steps do with blocks, in order: in which step, whether a block is opened (False) or
        full (True), and by which of the running sequences."""
        events: list[tuple[int, bool, int]] = []
        size = self.pool.block_size
        for order, sequence in enumerate(self._running):
            start = sequence.num_computed_tokens
            opened = range(len(sequence.blocks), self.pool.blocks_for(start + steps))
            events += [(index * size - start, False, order) for index in opened]
            filled = self._registrable(sequence, start + steps)
            events += [(max(0, (index + 1) * size - 1 - start), True, order) for index in filled]
        return sorted(events)

    def _missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        return self.pool.blocks_for(num_tokens) - len(sequence.blocks)

    @staticmethod
    def _remove(ranked: list[Sequence], sequence: Sequence) -> None:
        index = bisect_left(ranked, sequence.rank, key=_rank)
        assert ranked[index] is sequence
        del ranked[index]
