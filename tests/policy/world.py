"""A world around the scheduler: a model whose next token follows from all tokens before it, a memory that remembers
what was written where, and checks of what must hold in every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from zlib import crc32

from springtide.policy.prefix import next_hash, root_hash
from springtide.policy.scheduler import Batch, Scheduled, Scheduler

REJECTED = -1  # a draft token that the model would not have chosen


def link(content: int, token: int) -> int:
    """What the K/V of `token` is after all that `content` stands for."""
    return hash((content, token))  # of numbers: the same in every process


class Run:
    """A sequence as an engine knows it: its tokens, their hashes, its block table."""

    def __init__(self, prompt: list[int], limit: int, salt: str | None, block_size: int) -> None:
        self.limit = limit
        self.block_size = block_size
        self.tokens: list[int] = []
        self.contents: list[int] = []  # of each token
        self.hashes: list[bytes] | None = None if salt is None else []
        self.root = b"" if salt is None else root_hash(salt)
        self.table: list[int] = []
        self.computed = 0
        self.released = 0  # blocks
        self.extend(prompt)

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.tokens.append(token)
            self.contents.append(link(self.contents[-1] if self.contents else 0, token))
        self.extend_hashes(self.tokens)

    def extend_hashes(self, tokens: list[int]) -> None:
        if self.hashes is not None:
            for end in range((len(self.hashes) + 1) * self.block_size, len(tokens) + 1, self.block_size):
                parent = self.hashes[-1] if self.hashes else self.root
                self.hashes.append(next_hash(parent, tokens[end - self.block_size : end]))

    def future(self, count: int) -> list[int]:
        """The next `count` tokens that the model will choose."""
        content, tokens = self.contents[-1], []
        for _ in range(count):
            tokens.append(content % 3)
            content = link(content, tokens[-1])
        return tokens

    def lose_memory(self) -> None:
        self.table, self.computed, self.released = [], 0, 0


@dataclass
class World:
    scheduler: Scheduler
    runs: dict[str, Run] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    memory: dict[int, list[int]] = field(default_factory=dict)  # block -> contents of its slots
    meaning: dict[bytes, list[int]] = field(default_factory=dict)  # hash -> contents of a block that has it

    @property
    def block_size(self) -> int:
        return self.scheduler.pool.block_size

    def add(self, name: str, prompt: int | list[int], answer: int, priority: int = 0, salt: str | None = None) -> None:
        """A sequence with this prompt (of a number of tokens: nobody else's)."""
        tokens = [crc32(name.encode())] * prompt if isinstance(prompt, int) else prompt
        run = self.runs[name] = Run(tokens, len(tokens) + answer, salt, self.block_size)
        self.learn_meanings(run)
        self.scheduler.add(
            name, num_tokens=len(tokens), max_num_tokens=run.limit, priority=priority, block_hashes=run.hashes
        )

    def cancel(self, name: str) -> None:
        self.scheduler.cancel(name)
        self.runs.pop(name, None)

    def foresee(self) -> None:
        """Tell the scheduler the hashes of all blocks to come."""
        for run in self.runs.values():
            run.extend_hashes(run.tokens + run.future(run.limit - len(run.tokens)))

    def step(self, *, offer: int = 0, accept: int = 0, cancel: str | None = None) -> Batch:
        """One step. Who can draft offers `offer` drafts, of which `accept` are right; `cancel` is cancelled in the
        middle of it."""
        batch = self.scheduler.schedule(dict.fromkeys(self.scheduler.can_draft(), offer))
        self.check(batch)
        for name in batch.preempted:
            self.runs[name].lose_memory()
        for item in batch.items:
            self.run(item, accept)
        if cancel is not None:
            self.cancel(cancel)
        new = {item.id: self.gain(item, accept) for item in batch.items if item.id in self.runs}
        over = [name for name, run in self.runs.items() if len(run.tokens) == run.limit]
        self.scheduler.update(batch, new, over)
        for name in over:
            del self.runs[name]
        self.finished += over
        self.check_blocks()
        return batch

    def run(self, item: Scheduled, accept: int) -> None:
        """Read the K/V of all earlier tokens, write those of the tokens that run."""
        run, size = self.runs[item.id], self.block_size
        kept = item.num_blocks - len(item.new_blocks)
        assert len(run.table) >= kept
        if not run.table:
            assert item.start % size == 0, "cached tokens come in full blocks"
            run.computed = item.start
        run.table = [*run.table[:kept], *item.new_blocks]
        assert item.start == run.computed
        right = run.future(min(accept, item.num_drafts))
        drafts = right + [REJECTED] * (item.num_drafts - len(right))
        for position in range(run.released * size, item.start):
            found = self.memory[run.table[position // size]][position % size]
            assert found == run.contents[position], "it reads what somebody else wrote"
        content = run.contents[item.start - 1] if item.start else 0
        tokens, holders = [*run.tokens, *drafts], self.holders()
        for position in range(item.start, item.start + item.count):
            block = run.table[position // size]
            assert holders[block] == 1, "a block is written that others may read"
            content = link(content, tokens[position])
            self.memory.setdefault(block, [0] * size)[position % size] = content

    def gain(self, item: Scheduled, accept: int) -> int:
        """Count what ran; how many tokens the sequence gained."""
        run = self.runs[item.id]
        accepted = min(accept, item.num_drafts)
        run.computed += item.count - item.num_drafts + accepted
        new = run.future(accepted + 1) if item.samples else []
        run.extend(new)
        self.learn_meanings(run)
        return len(new)

    def learn_meanings(self, run: Run) -> None:
        for index, name in enumerate(run.hashes or ()):
            if (index + 1) * self.block_size <= len(run.tokens):
                contents = run.contents[index * self.block_size : (index + 1) * self.block_size]
                assert self.meaning.setdefault(name, contents) == contents

    def release(self, name: str, num_blocks: int) -> None:
        """A sequence lets go of at most `num_blocks` first blocks: as if all layers had a window."""
        if run := self.runs.get(name):
            run.released = max(run.released, min(num_blocks, run.computed // self.block_size))
            self.scheduler.release_blocks(name, run.released)

    def holders(self) -> Counter[int]:
        return Counter(block for sequence in self.scheduler._running for block in sequence.held_blocks)

    def check(self, batch: Batch) -> None:
        """What holds for every batch."""
        ids = [item.id for item in batch.items]
        assert len(set(ids)) == len(ids)
        assert not set(ids) & set(batch.preempted)
        assert batch.num_tokens <= self.scheduler.max_num_batched_tokens
        assert bool(ids) == bool(self.runs)
        for item in batch.items:
            known = len(self.runs[item.id].tokens)
            assert item.count > item.num_drafts >= 0
            assert item.samples == (item.start + item.count - item.num_drafts == known)
            assert item.num_drafts == 0 or item.samples
            assert known + item.num_drafts < self.runs[item.id].limit
            assert item.num_blocks == -(-(known + item.num_drafts) // self.block_size)
        load = self.scheduler.load()
        assert load.running + load.waiting == len(self.runs)
        assert load.running <= self.scheduler.max_num_running
        self.check_blocks()

    def check_blocks(self) -> None:
        """Every block is accounted for, and found only under the name of what is in it."""
        pool, holders = self.scheduler.pool, self.holders()
        assert dict(holders) == {block: count for block, count in enumerate(pool._num_holders) if count}
        assert pool.num_free == pool.num_blocks - len(holders)
        assert {*pool._blank, *pool._cached} == set(range(pool.num_blocks)) - set(holders)
        assert pool._block_of == {name: block for block, name in pool._hash_of.items()}
        assert {block for block, count in holders.items() if count > 1} <= set(pool._hash_of)
        for block, name in pool._hash_of.items():
            assert self.memory[block] == self.meaning[name]
