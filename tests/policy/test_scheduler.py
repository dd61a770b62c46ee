"""Stories about the scheduler: who runs, who waits, who gives way."""

from __future__ import annotations

import pytest

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


# ---- blocks, as batches name them


def test_a_batch_names_the_blocks_that_each_sequence_gains() -> None:
    s = scheduler(max_num_batched_tokens=8, block_size=4)
    s.add("a", num_tokens=11, max_num_tokens=30)
    tables = [(item.new_blocks, item.num_blocks) for _ in range(4) for item in run_step(s).items]
    assert tables == [((0, 1, 2), 3), ((), 3), ((), 3), ((3,), 4)]


def test_a_preempted_sequence_gets_a_new_table() -> None:
    s = scheduler(num_blocks=6, block_size=4)
    s.add("old", num_tokens=8, max_num_tokens=24)
    s.add("young", num_tokens=7, max_num_tokens=24)
    while "young" not in run_step(s).preempted:
        pass
    s.cancel("old")
    item = run_step(s).items[0]
    assert item.start == 0
    assert len(item.new_blocks) == item.num_blocks == 3


def test_blocks_that_no_token_will_read_are_given_back_one_by_one_and_only_once() -> None:
    s = scheduler(num_blocks=10, block_size=4)
    s.add("window", num_tokens=16, max_num_tokens=40)
    run_step(s)
    s.release_blocks("window", 3)
    s.release_blocks("window", 2)
    assert s.load().blocks_free == 10 - 1
    item = run_step(s).items[0]
    assert (item.num_blocks, len(item.new_blocks)) == (5, 1), "the table keeps its length"
    s.release_blocks("window", 4)
    s.cancel("window")
    s.release_blocks("window", 4)
    assert s.load().blocks_free == 10


# ---- drafts


def test_drafts_run_behind_the_newest_token_and_accepted_ones_count() -> None:
    s = scheduler(block_size=4)
    s.add("a", num_tokens=4, max_num_tokens=40)
    assert s.can_draft() == []
    run_step(s)
    assert s.can_draft() == ["a"]
    batch = s.schedule({"a": 5})
    item = batch.items[0]
    assert (item.start, item.count, item.num_drafts, item.samples) == (4, 6, 5, True)
    s.update(batch, {"a": 3})  # two drafts and one more
    again = run_step(s).items[0]
    assert (again.start, again.count, again.num_drafts) == (7, 1, 0)


def test_the_blocks_of_rejected_drafts_roll_back() -> None:
    s = scheduler(num_blocks=8, block_size=4)
    s.add("a", num_tokens=6, max_num_tokens=30)
    run_step(s)
    batch = s.schedule({"a": 10})
    assert (batch.items[0].num_blocks, s.load().blocks_free) == (5, 3)
    s.update(batch, {"a": 1})
    assert s.load().blocks_free == 6
    run_step(s)
    item = run_step(s).items[0]
    assert (len(item.new_blocks), item.num_blocks) == (1, 3), "the third place of its table is taken anew"


def test_drafts_get_only_what_is_left_of_budget_and_memory() -> None:
    s = scheduler(max_num_seqs=3, max_num_batched_tokens=9, num_blocks=12, block_size=4)
    s.add("a", num_tokens=3, max_num_tokens=20)
    s.add("b", num_tokens=4, max_num_tokens=20)
    run_step(s)
    s.add("prompt", num_tokens=4, max_num_tokens=5)
    batch = s.schedule({"a": 9, "b": 9, "prompt": 9, "nobody": 9})
    assert {item.id: (item.count, item.num_drafts) for item in batch.items} == {
        "a": (4, 3),
        "b": (1, 0),
        "prompt": (4, 0),
    }
    s.update(batch, {"a": 4, "b": 1})
    s.cancel("prompt")
    s.add("big", num_tokens=14, max_num_tokens=15)
    batch = s.schedule({"a": 9, "b": 9})
    assert batch.items[0].count == 1, "the prompt wants all of the budget"


def test_drafts_preempt_nobody_and_hold_up_no_admission() -> None:
    s = scheduler(num_blocks=4, block_size=4)
    s.add("a", num_tokens=3, max_num_tokens=16)
    run_step(s)
    batch = s.schedule({"a": 12})
    assert batch.items[0].num_drafts == 11
    s.update(batch, {"a": 1})
    s.add("b", num_tokens=4, max_num_tokens=5)
    batch = s.schedule({"a": 12})
    assert batch.preempted == ()
    assert {item.id: item.num_drafts for item in batch.items} == {"a": 7, "b": 0}


def test_no_draft_runs_that_could_not_be_followed_by_a_token() -> None:
    s = scheduler()
    s.add("a", num_tokens=4, max_num_tokens=8)
    run_step(s)
    batch = s.schedule({"a": 10})
    assert batch.items[0].num_drafts == 2  # tokens 5 and 6; the eighth is the last and does not run
    s.update(batch, {"a": 2})
    assert s.can_draft() == [], "its next token is its last"
    assert s.schedule({"a": 10}).items[0].num_drafts == 0


def test_a_sequence_cancelled_between_schedule_and_update_leaves_no_trace_even_if_its_id_comes_again() -> None:
    s = scheduler(block_size=4)
    s.add("a", num_tokens=4, max_num_tokens=8)
    batch = s.schedule()
    s.cancel("a")
    s.add("a", num_tokens=6, max_num_tokens=8)
    s.update(batch, {"a": 1})
    item = run_step(s).items[0]
    assert (item.start, item.count) == (0, 6)
