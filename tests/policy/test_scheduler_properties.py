"""What holds for the scheduler under any traffic: shared prefixes, priorities, cancellations at any moment, drafts
right and wrong, memory too small for all."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.policy.scheduler import Batch, Scheduler
from tests.policy.world import World

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
configs = st.fixed_dictionaries(
    {
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.integers(1, 24),
        "num_blocks": st.integers(5, 30),
        "block_size": st.sampled_from([1, 4, 16]),
    }
)
salts = st.sampled_from(["", "", "", "other", None])
prompts = st.tuples(st.integers(1, 40), st.integers(0, 1), st.integers(0, 8))  # tokens, family, last ones of its own
choices = st.integers(1, 4)
which = st.integers(0, 9)  # of the sequences that are there
add = st.tuples(st.just("add"), prompts, st.integers(1, 40), st.integers(-1, 1), salts, choices)
step = st.tuples(st.just("step"), st.integers(1, 6))
draft = st.tuples(st.just("draft"), st.integers(1, 6), st.integers(0, 6))
others = st.one_of(
    st.tuples(st.just("cancel"), which),
    st.tuples(st.just("cancel in a step"), which),
    st.tuples(st.just("release"), which, st.integers(0, 20)),
)
traffic = st.lists(st.one_of(add, add, step, draft, others), min_size=8, max_size=30)


def prompt_of(length: int, family: int, own: int, serial: int) -> list[int]:
    """Prompts of one family begin alike; the last `own` tokens nobody else has."""
    own = min(own, length)
    return [family] * (length - own) + [1_000 + serial] * own


def play(world: World, event: tuple[Any, ...], serial: int) -> None:
    match event:
        case ("add", (length, family, own), answer, priority, salt, choices):
            room = world.scheduler.pool.num_blocks * world.block_size
            length = min(length, room - 1)
            prompt = prompt_of(length, family, own, serial)
            for choice in range(choices):
                world.add(f"{serial}.{choice}", prompt, min(answer, room - length), priority, salt)
        case ("cancel", which):
            world.cancel(one_of(world, which))
        case ("cancel in a step", which):
            world.step(cancel=one_of(world, which))
        case ("release", which, num_blocks):
            world.release(one_of(world, which), num_blocks)
        case ("step", times):
            for _ in range(times):
                world.step()
        case ("draft", offer, accept):
            world.step(offer=offer, accept=accept)


def one_of(world: World, which: int) -> str:
    names = list(world.runs)
    return names[which % len(names)] if names else "nobody"


def play_all(config: dict[str, int], events: list[tuple[Any, ...]]) -> World:
    world = World(Scheduler(**config))
    for serial, event in enumerate(events):
        play(world, event, serial)
    return world


@settings(max_examples=200, deadline=None)
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


@settings(max_examples=200, deadline=None)
@given(configs, traffic, st.data())
def test_advancing_equals_that_many_single_steps(config: Any, events: Any, data: st.DataObject) -> None:
    world = play_all(config, events)
    for _ in range(12):
        if not world.scheduler.quiet_steps():
            world.step()
    if data.draw(st.booleans()):
        world.foresee()
    quiet = world.scheduler.quiet_steps()
    steps = data.draw(st.integers(0, quiet))
    one_by_one, at_once = copy.deepcopy(world.scheduler), copy.deepcopy(world.scheduler)
    at_once.advance(steps)
    gained: dict[str, tuple[int, ...]] = defaultdict(tuple)
    for _ in range(steps):
        batch = one_by_one.schedule()
        one_by_one.update(batch, {item.id: 1 for item in batch.items})
        assert not batch.preempted
        assert all(item.samples and item.count == 1 for item in batch.items)
        assert len(batch.items) == world.scheduler.load().running
        for item in batch.items:
            gained[item.id] += item.new_blocks
    assert one_by_one.load() == at_once.load()
    assert one_by_one._slow == at_once._slow
    assert vars(one_by_one.pool) == vars(at_once.pool)
    assert list(one_by_one.pool._cached) == list(at_once.pool._cached)
    assert one_by_one.quiet_steps() == at_once.quiet_steps() == quiet - steps
    expected, batch = one_by_one.schedule(), at_once.schedule()
    assert batch == replace(
        expected,
        items=tuple(replace(item, new_blocks=gained[item.id] + item.new_blocks) for item in expected.items),
    )


@settings(max_examples=100, deadline=None)
@given(configs, st.lists(sizes, min_size=1, max_size=12), sizes, st.lists(sizes, max_size=30), st.integers(0, 8), salts)
def test_delay_is_bounded_by_what_came_before(
    config: Any, before: Any, mine: Any, after: Any, own: int, salt: Any
) -> None:
    """However much comes after it, a sequence waits only for the work of those that came before; those whose prefix
    it shares, and who may be computing it, included."""
    config = config | {"block_size": 16, "num_blocks": 40}  # memory for all: preemption has its own bound, by rank
    world = World(Scheduler(**config))

    def add(name: str, prompt: int, answer: int) -> None:
        world.add(name, prompt_of(prompt, 0, own, len(world.runs)), answer, salt=salt)

    for serial, (prompt, answer) in enumerate(before):
        add(f"before {serial}", prompt, answer)
    add("mine", *mine)
    # Each step gives every running elder at least a token, or gives the first that is behind half of what is left.
    bound = 2 * (sum(prompt + answer for prompt, answer in before) + sum(mine))
    for step in range(bound):
        if step < len(after):
            add(f"after {step}", *after[step])
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
    s.update(s.schedule(), {})
    s.add("short", num_tokens=budget // 2, max_num_tokens=budget)
    batch = s.schedule()
    assert {item.id: item.count for item in batch.items}["short"] == budget // 2
    assert batch.num_tokens == budget


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100), st.integers(0, 20), st.integers(1, 5), st.sampled_from([1, 4, 16]))
def test_choices_of_one_prompt_compute_its_full_blocks_once(length: int, own: int, choices: int, size: int) -> None:
    world = World(Scheduler(max_num_seqs=8, max_num_batched_tokens=40, num_blocks=1_000, block_size=size))
    for choice in range(choices):
        world.add(f"choice {choice}", prompt_of(length, 0, own, 0), 1, salt="")
    num_tokens = 0
    while world.scheduler.has_work():
        num_tokens += world.step().num_tokens
    shared = (length - 1) // size * size
    assert num_tokens == length + (choices - 1) * (length - shared)


@settings(max_examples=100, deadline=None)
@given(configs, traffic, st.integers(1, 6))
def test_rejected_drafts_change_nothing_for_anybody(config: Any, events: Any, offer: int) -> None:
    """Without a prefix cache, whose least recently used blocks they may cost somebody."""
    plain, drafting = World(Scheduler(**config)), World(Scheduler(**config))
    for serial, event in enumerate(events):
        if event[0] in ("step", "draft", "cancel in a step"):
            assert without_drafts(plain.step()) == without_drafts(drafting.step(offer=offer))
            continue
        if event[0] == "add":
            event = (*event[:4], None, event[5])
        play(plain, event, serial)
        play(drafting, event, serial)


def without_drafts(batch: Batch) -> tuple[Any, ...]:
    items = [(item.id, item.start, item.count - item.num_drafts, item.samples) for item in batch.items]
    return items, batch.preempted
