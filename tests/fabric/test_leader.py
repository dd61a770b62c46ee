"""One leads; when it leaves or dies another does; nobody leads who can't be sure of it."""

from __future__ import annotations

import asyncio
import time

from springtide.fabric.leader import Leadership
from tests.fabric.conftest import World, until


async def start_candidates(world: World, count: int = 3, ttl: float = 0.8) -> list[Leadership]:
    candidates = [
        Leadership(await world.platform(f"c{number}"), "ledger", f"c{number}", ttl=ttl) for number in range(count)
    ]
    for candidate in candidates:
        await candidate.start()
        world.stack.push_async_callback(candidate.stop)
    return candidates


def leaders(candidates: list[Leadership]) -> list[Leadership]:
    return [candidate for candidate in candidates if candidate.is_leader]


async def test_exactly_one_leads_and_keeps_leading(world: World) -> None:
    candidates = await start_candidates(world)
    await until(lambda: leaders(candidates))
    first = leaders(candidates)
    for _ in range(20):
        await asyncio.sleep(0.05)
        assert leaders(candidates) == first and len(first) == 1


async def test_who_leaves_in_order_is_followed_at_once(world: World) -> None:
    candidates = await start_candidates(world, ttl=60.0)
    await until(lambda: leaders(candidates))
    [first] = leaders(candidates)
    await first.stop()
    await until(lambda: leaders(candidates))  # long before the lease would have run out
    assert leaders(candidates) != [first]


async def test_who_dies_is_followed_when_its_lease_runs_out(world: World) -> None:
    candidates = await start_candidates(world)
    await until(lambda: leaders(candidates))
    [first] = leaders(candidates)
    told: list[bool] = []
    for candidate in candidates:
        candidate.on_change(lambda: told.append(True))
    assert first._task is not None
    first._task.cancel()
    died = time.monotonic()
    await until(lambda: [c for c in leaders(candidates) if c is not first])
    assert not first.is_leader  # its own clock told it, without a word from outside
    assert time.monotonic() - died > 0.5
    assert told


async def test_nobody_leads_without_a_server_and_one_does_when_it_is_back(world: World) -> None:
    candidates = await start_candidates(world)
    await until(lambda: leaders(candidates))
    world.server.kill()
    await until(lambda: not leaders(candidates))
    world.server.start()
    await until(lambda: leaders(candidates))
    assert len(leaders(candidates)) == 1
