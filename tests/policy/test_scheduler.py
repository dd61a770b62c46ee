"""Stories about the scheduler, and properties that hold for any traffic."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.core.errors import InvalidRequest
from springtide.policy.scheduler import Batch, Scheduler


def scheduler(
    *, max_num_seqs: int = 8, max_num_batched_tokens: int = 64, num_blocks: int = 64, block_size: int = 4
) -> Scheduler:
    return Scheduler(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_blocks=num_blocks,
        block_size=block_size,
    )


def run_step(scheduler: Scheduler) -> Batch:
    """One step of a model that gives a token to everybody and never ends anybody."""
    batch = scheduler.schedule()
    scheduler.update(batch, {item.id: 1 for item in batch.items if item.samples})
    return batch


def tokens_of(batch: Batch) -> dict[str, int]:
    return {item.id: item.count for item in batch.items}


@dataclass
class World:
    """A scheduler, a model that ends sequences at their `max_num_tokens`, and checks of what must always hold."""

    scheduler: Scheduler
    limits: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)

    def add(self, name: str, prompt: int, answer: int, priority: int = 0) -> None:
        self.scheduler.add(name, num_tokens=prompt, max_num_tokens=prompt + answer, priority=priority)
        self.limits[name], self.tokens[name], self.computed[name] = prompt + answer, prompt, 0

    def cancel(self, name: str) -> None:
        self.scheduler.cancel(name)
        self.tokens.pop(name, None)

    def step(self) -> Batch:
        batch = self.scheduler.schedule()
        self.check(batch)
        new = {item.id: 1 for item in batch.items if item.samples}
        for item in batch.items:
            self.computed[item.id] += item.count
            self.tokens[item.id] += item.samples
        over = [name for name in new if self.tokens[name] == self.limits[name]]
        self.scheduler.update(batch, new, over)
        for name in over:
            del self.tokens[name]
        self.finished += over
        return batch

    def check(self, batch: Batch) -> None:
        for name in batch.preempted:
            self.computed[name] = 0
        ids = [item.id for item in batch.items]
        assert len(set(ids)) == len(ids)
        assert not set(ids) & set(batch.preempted)
        assert batch.num_tokens <= self.scheduler.max_num_batched_tokens
        assert bool(ids) == bool(self.tokens)
        for item in batch.items:
            assert item.count > 0
            assert item.start == self.computed[item.id]
            assert item.samples == (item.start + item.count == self.tokens[item.id])
        load = self.scheduler.load()
        assert load.running + load.waiting == len(self.tokens)
        assert load.running <= self.scheduler.max_num_running
        held = sum(-(-(item.start + item.count) // self.scheduler.pool.block_size) for item in batch.items)
        assert held <= load.blocks_total - load.blocks_free


# ---- stories


def test_a_prompt_runs_in_chunks_and_then_token_by_token() -> None:
    s = scheduler(max_num_batched_tokens=10)
    s.add("a", num_tokens=25, max_num_tokens=30)
    counts = [(item.start, item.count, item.samples) for _ in range(5) for item in run_step(s).items]
    assert counts == [(0, 10, False), (10, 10, False), (20, 5, True), (25, 1, True), (26, 1, True)]


def test_a_new_prompt_shares_the_step_with_running_sequences() -> None:
    s = scheduler(max_num_batched_tokens=10)
    s.add("a", num_tokens=3, max_num_tokens=20)
    run_step(s)
    s.add("b", num_tokens=30, max_num_tokens=40)
    assert tokens_of(run_step(s)) == {"a": 1, "b": 9}


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    s = scheduler(max_num_batched_tokens=16, num_blocks=1000)
    s.add("long", num_tokens=1000, max_num_tokens=1001)
    run_step(s)
    s.add("short", num_tokens=8, max_num_tokens=20)
    batch = run_step(s)
    assert tokens_of(batch) == {"long": 8, "short": 8}
    assert batch.items[1].samples


def test_a_step_wastes_nothing_when_the_first_needs_little() -> None:
    s = scheduler(max_num_batched_tokens=16)
    s.add("a", num_tokens=4, max_num_tokens=5)
    s.add("b", num_tokens=40, max_num_tokens=41)
    assert tokens_of(run_step(s)) == {"a": 4, "b": 12}


def test_a_few_new_tokens_at_once_come_before_any_prompt() -> None:
    s = scheduler(max_num_seqs=4, max_num_batched_tokens=16)
    s.add("fast", num_tokens=4, max_num_tokens=40)
    s.update(s.schedule(), {"fast": 4})  # as a model with accepted drafts gives them
    s.add("long", num_tokens=100, max_num_tokens=101)
    assert tokens_of(s.schedule()) == {"fast": 4, "long": 12}


def test_short_prompts_without_end_do_not_starve_a_long_one() -> None:
    s = scheduler(max_num_batched_tokens=16, max_num_seqs=8, num_blocks=1000)
    s.add("long", num_tokens=400, max_num_tokens=401)
    for step in range(50):
        s.add(f"short {step}", num_tokens=16, max_num_tokens=17)
        batch = s.schedule()
        done = [item.id for item in batch.items if item.samples]
        s.update(batch, dict.fromkeys(done, 1), done)
        assert tokens_of(batch)["long"] >= 8
    assert "long" in done


def test_with_more_seats_than_tokens_everybody_still_gets_a_token_each_step() -> None:
    s = scheduler(max_num_seqs=16, max_num_batched_tokens=3)
    for name in "abcde":
        s.add(name, num_tokens=1, max_num_tokens=10)
    assert [tokens_of(run_step(s)) for _ in range(2)] == [{"a": 1, "b": 1, "c": 1}] * 2
    s.cancel("b")
    assert tokens_of(run_step(s)) == {"a": 1, "c": 1, "d": 1}


def test_the_youngest_is_preempted_and_comes_back_with_all_its_tokens() -> None:
    s = scheduler(num_blocks=6, block_size=4)
    s.add("old", num_tokens=8, max_num_tokens=24)
    s.add("young", num_tokens=7, max_num_tokens=24)
    batches = [run_step(s) for _ in range(10)]
    at = next(step for step, batch in enumerate(batches) if batch.preempted)
    assert batches[at].preempted == ("young",)
    assert tokens_of(batches[at]) == {"old": 1}
    assert s.load().preemptions == 1
    known = 7 + at  # one token for each step that it ran
    s.cancel("old")
    again = run_step(s).items[0]
    assert (again.id, again.start, again.count, again.samples) == ("young", 0, known, True)


def test_a_lower_priority_is_preempted_before_a_younger_sequence() -> None:
    s = scheduler(num_blocks=8, block_size=4)
    s.add("batch job", num_tokens=8, max_num_tokens=24, priority=-1)
    run_step(s)
    s.add("first", num_tokens=7, max_num_tokens=24)
    s.add("second", num_tokens=3, max_num_tokens=24)
    preempted = [name for _ in range(8) for name in run_step(s).preempted]
    assert preempted[0] == "batch job"


def test_a_higher_priority_takes_the_place_of_a_running_lower_one() -> None:
    s = scheduler(max_num_seqs=1)
    s.add("batch job", num_tokens=8, max_num_tokens=24, priority=-1)
    run_step(s)
    s.add("person", num_tokens=4, max_num_tokens=6)
    batch = run_step(s)
    assert batch.preempted == ("batch job",)
    assert tokens_of(batch) == {"person": 4}


def test_nobody_is_pushed_out_for_a_sequence_that_would_not_fit_even_then() -> None:
    s = scheduler(num_blocks=10, block_size=4)
    s.add("equal", num_tokens=24, max_num_tokens=28)
    s.add("lower", num_tokens=4, max_num_tokens=8, priority=-1)
    run_step(s)
    s.add("big", num_tokens=30, max_num_tokens=31)
    assert run_step(s).preempted == ()


def test_a_big_sequence_is_not_overtaken_while_it_waits_for_memory() -> None:
    s = scheduler(num_blocks=10, block_size=4)
    s.add("running", num_tokens=20, max_num_tokens=28)
    run_step(s)
    s.add("big", num_tokens=30, max_num_tokens=31)
    s.add("small", num_tokens=2, max_num_tokens=4)
    assert tokens_of(run_step(s)) == {"running": 1}
    s.cancel("running")
    assert list(tokens_of(run_step(s))) == ["big", "small"]


def test_a_sequence_that_could_never_fit_is_refused_with_what_would_fit() -> None:
    s = scheduler(num_blocks=6, block_size=4)
    with pytest.raises(InvalidRequest, match=r"grow to 25 tokens.* holds 24"):
        s.add("a", num_tokens=20, max_num_tokens=25)
    assert not s.has_work()
    s.add("b", num_tokens=20, max_num_tokens=24)


def test_cancel_frees_blocks_at_once_even_in_the_middle_of_a_step() -> None:
    s = scheduler(num_blocks=20)
    s.add("a", num_tokens=9, max_num_tokens=20)
    s.add("b", num_tokens=4, max_num_tokens=20)
    batch = s.schedule()
    assert s.load().blocks_free == 16
    s.cancel("a")
    s.cancel("a")
    s.cancel("never heard of")
    assert s.load().blocks_free == 19
    s.update(batch, {"a": 1, "b": 1})
    assert tokens_of(run_step(s)) == {"b": 1}


def test_a_resumed_sequence_is_just_one_with_more_tokens() -> None:
    s = scheduler()
    s.add("a", num_tokens=10 + 5, max_num_tokens=30)
    assert tokens_of(run_step(s)) == {"a": 15}


def test_quiet_steps_stop_before_memory_runs_out_and_before_the_end() -> None:
    s = scheduler(num_blocks=6, block_size=4)
    s.add("a", num_tokens=5, max_num_tokens=20)
    assert s.quiet_steps() == 0
    run_step(s)
    assert s.quiet_steps() == 20 - 6 - 1
    s.add("b", num_tokens=1, max_num_tokens=20)
    assert s.quiet_steps() == 0  # b will be admitted
    run_step(s)
    assert s.quiet_steps() == 7
    s.advance(7)
    assert s.load().blocks_free == 0
    assert run_step(s).preempted == ("b",)


# ---- properties

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
configs = st.fixed_dictionaries(
    {
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.integers(1, 24),
        "num_blocks": st.integers(20, 40),
        "block_size": st.sampled_from([1, 4, 16]),
    }
)
traffic = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 40), st.integers(1, 40), st.integers(-1, 1)),
        st.tuples(st.just("cancel"), st.integers(0, 40)),
        st.tuples(st.just("step"), st.integers(1, 6)),
    ),
    max_size=40,
)


def play(world: World, event: tuple[Any, ...], serial: int) -> None:
    match event:
        case ("add", prompt, answer, priority):
            room = world.scheduler.pool.num_blocks * world.scheduler.pool.block_size
            prompt = min(prompt, room - 1)
            world.add(f"s{serial}", prompt, min(answer, room - prompt), priority)
        case ("cancel", which):
            world.cancel(f"s{which}")
        case ("step", times):
            for _ in range(times):
                world.step()


def play_all(config: dict[str, int], events: list[tuple[Any, ...]]) -> World:
    world = World(Scheduler(**config))
    for serial, event in enumerate(events):
        play(world, event, serial)
    return world


@settings(max_examples=150, deadline=None)
@given(configs, traffic)
def test_every_sequence_ends_exactly_once_and_every_block_comes_back(config: Any, events: Any) -> None:
    world = play_all(config, events)
    for _ in range(20_000):
        if not world.scheduler.has_work():
            break
        world.step()
    assert not world.scheduler.has_work(), "somebody starves"
    assert all(count == 1 for count in Counter(world.finished).values())
    load = world.scheduler.load()
    assert (load.running, load.waiting, load.blocks_free) == (0, 0, load.blocks_total)


@settings(max_examples=50, deadline=None)
@given(configs, traffic)
def test_the_same_traffic_gives_the_same_batches(config: Any, events: Any) -> None:
    first, second = play_all(config, events), play_all(config, events)
    assert [first.step() for _ in range(5)] == [second.step() for _ in range(5)]


@settings(max_examples=150, deadline=None)
@given(configs, traffic, st.data())
def test_advancing_equals_that_many_single_steps(config: Any, events: Any, data: st.DataObject) -> None:
    world = play_all(config, events)
    for _ in range(12):
        if not world.scheduler.quiet_steps():
            world.step()
    quiet = world.scheduler.quiet_steps()
    steps = data.draw(st.integers(0, quiet))
    one_by_one, at_once = copy.deepcopy(world.scheduler), copy.deepcopy(world.scheduler)
    at_once.advance(steps)
    for _ in range(steps):
        batch = run_step(one_by_one)
        assert not batch.preempted
        assert all(item.samples and item.count == 1 for item in batch.items)
        assert len(batch.items) == world.scheduler.load().running
    assert one_by_one.load() == at_once.load()
    assert one_by_one.quiet_steps() == at_once.quiet_steps() == quiet - steps
    assert one_by_one.schedule() == at_once.schedule()


@settings(max_examples=100, deadline=None)
@given(configs, st.lists(sizes, min_size=1, max_size=12), sizes, st.lists(sizes, max_size=30))
def test_delay_is_bounded_by_what_came_before(config: Any, before: Any, mine: Any, after: Any) -> None:
    """However much comes after it, a sequence waits only for the work of those that came before."""
    config = config | {"block_size": 16}  # memory for all: preemption has its own bound, by rank
    world = World(Scheduler(**config))
    for serial, (prompt, answer) in enumerate(before):
        world.add(f"before {serial}", prompt, answer)
    world.add("mine", *mine)
    # Each step gives every running elder at least a token, or gives the first that is behind half of what is left.
    bound = 2 * (sum(prompt + answer for prompt, answer in before) + sum(mine))
    for step in range(bound):
        if step < len(after):
            world.add(f"after {step}", *after[step])
        world.step()
        if "mine" in world.finished:
            return
    pytest.fail("it waited longer than its elders' work explains")


@settings(max_examples=100, deadline=None)
@given(st.integers(8, 64), st.integers(1, 4), st.integers(1, 2_000))
def test_a_short_prompt_starts_at_once_whatever_the_long_ones_are(budget: int, longs: int, length: int) -> None:
    s = Scheduler(max_num_seqs=8, max_num_batched_tokens=budget, num_blocks=10_000, block_size=4)
    for serial in range(longs):
        s.add(f"long {serial}", num_tokens=length + budget * 2, max_num_tokens=length + budget * 2 + 1)
    run_step(s)
    s.add("short", num_tokens=budget // 2, max_num_tokens=budget)
    batch = s.schedule()
    assert tokens_of(batch)["short"] == budget // 2
    assert batch.num_tokens == budget
