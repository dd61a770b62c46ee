"""The hash chain, and stories of the prefix cache: what is computed once, what is shared, who waits for whom."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from springtide.policy.prefix import next_hash, root_hash
from springtide.policy.scheduler import Batch, Scheduler
from tests.policy.world import World

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=6)


def test_a_hash_is_the_same_in_every_process() -> None:
    block = next_hash(root_hash("tenant"), [1, 2, 3])
    assert root_hash("tenant").hex() == "b6e2ff541eb913c5e286b57bbd98adf3"
    assert block.hex() == "d2546d83f51b66438a0db65b5814ebc9"
    assert len(root_hash("")) == len(block) == 16


@given(st.text(max_size=3), tokens, tokens, st.text(max_size=3), tokens, tokens)
def test_hashes_are_equal_just_where_salt_and_all_tokens_are(
    salt: str, first: list[int], second: list[int], other_salt: str, other_first: list[int], other_second: list[int]
) -> None:
    mine, others = (salt, first, second), (other_salt, other_first, other_second)
    assert (chain(*mine) == chain(*others)) == (mine == others)
    assert chain(*mine) == chain(*mine)


def chain(salt: str, *blocks: list[int]) -> bytes:
    name = root_hash(salt)
    for block in blocks:
        name = next_hash(name, block)
    return name


def test_no_salt_imitates_a_block() -> None:
    imitation = chr(0) * 16 + chr(7) + chr(0) * 7
    assert root_hash(imitation) != next_hash(bytes(16), [7])


# ---- the cache at work


def world(
    *, max_num_seqs: int = 8, max_num_batched_tokens: int = 64, num_blocks: int = 64, block_size: int = 4
) -> World:
    return World(
        Scheduler(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_blocks=num_blocks,
            block_size=block_size,
        )
    )


def starts(batch: Batch) -> dict[str, int]:
    return {item.id: item.start for item in batch.items}


def counts(batch: Batch) -> dict[str, int]:
    return {item.id: item.count for item in batch.items}


def run_out(world: World) -> None:
    while world.scheduler.has_work():
        world.step()


PROMPT = list(range(100, 122))  # 22 tokens: five full blocks and a half


def test_the_next_turn_of_a_chat_finds_prompt_and_answer_cached() -> None:
    w = world()
    w.add("first turn", PROMPT, 20, salt="")
    run = w.runs["first turn"]
    run_out(w)
    w.add("second turn", [*run.tokens, 7, 7, 7], 4, salt="")
    # 42 tokens; the last one was never computed. Ten blocks are full.
    assert starts(w.step()) == {"second turn": 40}


def test_equal_prompts_share_only_under_equal_salts() -> None:
    w = world()
    for salt in ("", None):
        w.add(f"before {salt}", PROMPT, 1, salt=salt)
    run_out(w)
    for salt in ("", "tenant", None):
        w.add(f"after {salt}", PROMPT, 1, salt=salt)
    assert starts(w.step()) == {"after ": 20, "after tenant": 0, "after None": 0}


def test_a_prompt_that_is_cached_to_its_last_token_still_runs_that_token() -> None:
    w = world()
    w.add("a", PROMPT[:20], 1, salt="")
    run_out(w)
    w.add("b", PROMPT[:20], 1, salt="")
    item = w.step().items[0]
    assert (item.start, item.count, item.samples) == (16, 4, True)


def test_a_shared_block_counts_once_and_is_free_when_the_last_one_leaves() -> None:
    w = world()
    w.add("a", PROMPT, 30, salt="")
    w.step()
    w.add("b", PROMPT, 30, salt="")
    batch = w.step()
    assert batch.items[1].new_blocks[:5] == tuple(w.runs["a"].table[:5])
    assert w.scheduler.load().blocks_free == 64 - 7
    w.cancel("a")
    assert w.scheduler.load().blocks_free == 64 - 6
    w.cancel("b")
    assert w.scheduler.load().blocks_free == 64


def test_cached_blocks_are_not_free_any_more_once_they_are_shared() -> None:
    w = world(num_blocks=8)
    w.add("before", PROMPT[:20], 1, salt="")
    run_out(w)
    w.add("running", 8, 10)
    w.step()
    assert w.scheduler.load().blocks_free == 6, "five of them hold the prefix"
    w.add("again", [*PROMPT[:20], 1, 2, 3, 4], 1, salt="")
    # It finds these five, but takes six in all, and one is kept for the other's next token.
    assert "again" not in starts(w.step())
    w.cancel("running")
    assert starts(w.step()) == {"again": 20}


def test_what_is_never_computed_is_never_found() -> None:
    w = world()
    w.add("a", PROMPT, 1, salt="")
    w.step(cancel="a")
    w.add("b", PROMPT, 1, salt="")
    assert starts(w.step()) == {"b": 0}


def test_a_preempted_sequence_comes_back_cheaply() -> None:
    w = world(num_blocks=8)
    w.add("old", 4, 20)
    w.add("young", PROMPT[:18], 10, salt="")
    while "young" not in w.step().preempted:
        pass
    known = len(w.runs["young"].tokens)
    w.cancel("old")
    item = w.step().items[0]
    # The old one took its sixth block, which was not full.
    assert (item.start, item.start + item.count) == (20, known)


def test_a_window_s_blocks_stay_cached_and_a_preempted_one_takes_all_again() -> None:
    w = world(num_blocks=8)
    w.add("window", PROMPT, 9, salt="")
    w.step()
    w.release("window", 5)
    assert w.scheduler.load().blocks_free == 7
    w.add("person", 20, 1, priority=1)
    assert w.step().preempted == ()
    w.add("bigger person", 28, 1, priority=1)
    assert w.step().preempted == ("window",)
    item = w.step().items[0]
    assert item.start % 4 == 0
    assert len(item.new_blocks) == item.num_blocks == 6


def test_a_hash_that_comes_late_names_no_block_that_was_let_go() -> None:
    s = Scheduler(max_num_seqs=4, max_num_batched_tokens=64, num_blocks=8, block_size=4)
    hashes: list[bytes] = []
    s.add("late", num_tokens=9, max_num_tokens=20, block_hashes=hashes)
    s.update(s.schedule(), {"late": 1})
    s.release_blocks("late", 1)
    hashes += [b"first", b"second"]
    s.update(s.schedule(), {"late": 1})
    assert s.pool.find([b"first"]) == []
    assert len(s.pool.find([b"second"])) == 1


# ---- waiting for what somebody is computing


def test_choices_of_one_prompt_wait_for_the_first_and_share_its_blocks() -> None:
    w = world(max_num_batched_tokens=16)
    for choice in range(4):
        w.add(f"choice {choice}", PROMPT, 5, salt="")
    assert counts(w.step()) == {"choice 0": 16}
    assert counts(w.step()) == {"choice 0": 6}
    batch = w.step()
    assert starts(batch) == {"choice 0": 22, "choice 1": 20, "choice 2": 20, "choice 3": 20}
    assert w.scheduler.load().blocks_free == 64 - 5 - 4


def test_sequences_part_where_their_prompts_do() -> None:
    w = world(max_num_batched_tokens=8)
    w.add("long", [*PROMPT[:8], *range(40)], 5, salt="")
    w.add("short", [*PROMPT[:8], 7], 5, salt="")
    assert starts(w.step()) == {"long": 0}
    assert starts(w.step()) == {"long": 8, "short": 8}


def test_who_waits_for_a_prefix_is_passed_but_keeps_its_seat() -> None:
    w = world(max_num_seqs=3, max_num_batched_tokens=12)
    w.add("leader", PROMPT, 30, salt="")
    w.add("follower", PROMPT, 30, salt="")
    w.add("stranger", 4, 30)
    w.add("last", 4, 30)
    assert list(counts(w.step())) == ["leader", "stranger"]
    for _ in range(3):
        batch = w.step()
    assert list(counts(batch)) == ["leader", "follower", "stranger"]


def test_who_waits_for_a_prefix_keeps_its_memory() -> None:
    w = world(max_num_batched_tokens=8, num_blocks=16)
    w.add("leader", PROMPT, 3, salt="")
    w.add("follower", PROMPT, 3, salt="")
    w.add("stranger", 12, 3)  # six, six, three, and one for each that runs
    assert list(counts(w.step())) == ["leader"]
    # As the leader gets on, the follower will need less: then there is room for the stranger too.
    assert list(counts(w.step())) == ["leader", "stranger"]
    run_out(w)
    assert w.scheduler.load().preemptions == 0


def test_nobody_is_pushed_out_while_one_before_waits_for_a_prefix() -> None:
    w = world(max_num_seqs=3)
    w.add("batch job", 4, 30, priority=-1)
    w.step()
    for name in ("leader", "follower"):
        w.add(name, PROMPT, 30, salt="")
    w.add("stranger", 4, 30)
    assert w.step().preempted == ()
    batch = w.step()
    assert batch.preempted == ("batch job",)
    assert list(counts(batch)) == ["leader", "follower", "stranger"]


def test_a_follower_computes_for_itself_when_its_leader_is_cancelled() -> None:
    w = world(max_num_batched_tokens=8)
    w.add("leader", PROMPT, 5, salt="")
    w.add("follower", PROMPT, 5, salt="")
    w.step()
    w.step(cancel="leader")
    assert starts(w.step()) == {"follower": 8}, "what the first step computed is there, what the second did is not"


def test_a_follower_goes_on_when_its_leader_is_pushed_out() -> None:
    w = world(max_num_seqs=1, max_num_batched_tokens=8)
    w.add("leader", PROMPT, 5, priority=-1, salt="")
    w.add("follower", PROMPT, 5, priority=-1, salt="")
    w.step()
    w.add("person", 4, 1)
    assert w.step().preempted == ("leader",)
    assert starts(w.step()) == {"leader": 8}
    run_out(w)
    assert w.finished == ["person", "leader", "follower"]


def test_nobody_waits_for_a_less_important_one() -> None:
    w = world(max_num_batched_tokens=16)
    w.add("batch job", [*PROMPT, *range(40)], 5, priority=-1, salt="")
    w.step()
    w.add("person", [*PROMPT, 7], 5, salt="")
    assert starts(w.step())["person"] == 16


def test_nobody_waits_for_a_slow_one() -> None:
    w = world(max_num_seqs=8, max_num_batched_tokens=8, num_blocks=200)
    w.add("longest", 200, 5)
    w.step()
    w.add("slow", [*PROMPT, *range(40)], 5, salt="")
    w.add("shorter", 30, 5)
    w.add("person", [*PROMPT, 7], 5, salt="")
    assert counts(w.step()) == {"longest": 4, "shorter": 4}, "nothing was left for the slow one"
    assert counts(w.step()) == {"longest": 4, "person": 4}


def test_nobody_waits_for_tokens_that_are_not_there_yet() -> None:
    w = world()
    w.add("writer", PROMPT[:4], 30, salt="")
    run = w.runs["writer"]
    w.step()
    w.foresee()
    w.add("reader", [*run.tokens, *run.future(10)], 5, salt="")
    assert starts(w.step()) == {"writer": 4, "reader": 4}


def test_pushing_out_a_sequence_frees_only_what_nobody_else_holds() -> None:
    w = world(num_blocks=12)
    w.add("person", PROMPT, 5, salt="")
    w.step()
    w.add("batch job", PROMPT, 5, priority=-1, salt="")
    w.step()
    # Five blocks are free. Of the batch job's six or seven all but one or two are the person's too.
    assert w.scheduler.load().blocks_free == 5
    w.add("big", 28, 1)
    batch = w.step()
    assert batch.preempted == ()
    assert "big" not in counts(batch)


def test_steps_are_not_called_quiet_in_which_a_gap_in_the_cache_may_close() -> None:
    s = Scheduler(max_num_seqs=3, max_num_batched_tokens=3, num_blocks=12, block_size=4)
    hashes = [b"0", b"1", b"2", b"3"]

    def step() -> list[str]:
        batch = s.schedule()
        s.update(batch, {item.id: 1 for item in batch.items if item.samples})
        return [item.id for item in batch.items]

    s.add("first", num_tokens=8, max_num_tokens=9, block_hashes=hashes)
    step()
    s.add("second", num_tokens=17, max_num_tokens=40, priority=1, block_hashes=hashes)
    step()  # both compute block 0; the first is quicker, so the second has a private one
    s.cancel("first")
    while s.quiet_steps() == 0:
        step()
    s.add("filler", num_tokens=s.load().blocks_free * 4 - 4, max_num_tokens=40)
    while s.pool.num_free:
        step()
    s.cancel("filler")
    assert s.pool.find(hashes) == []
    assert s.pool.num_registered(hashes) == 3

    s.add("closes the gap", num_tokens=3, max_num_tokens=20, block_hashes=hashes[:1])
    while "closes the gap" not in s.can_draft():
        step()
    s.add("waiting", num_tokens=17, max_num_tokens=18, block_hashes=hashes)
    assert s.quiet_steps() == 0
    assert ["waiting" in step() for _ in range(3)] == [False, False, True]
