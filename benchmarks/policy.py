"""What the decisions cost that lie in every step: 64 running sequences to schedule, a turn to grant among 64 flows.

python benchmarks/policy.py [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from springtide.core.figures import cpu_name, figure, versions, write_json
from springtide.fabric.streams import Backlog
from springtide.policy.fairness import TurnKeeper
from springtide.policy.scheduler import Scheduler

ROUNDS = 2000
SEQUENCES = 64


def microseconds(decide: Callable[[], object], settle: Callable[[object], None]) -> float:
    """The median of `decide`; `settle` brings things back to where they were."""
    took = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        decided = decide()
        took.append(time.perf_counter() - started)
        settle(decided)
    return statistics.median(took) * 1e6


def schedule() -> float:
    """A step of running sequences, whose blocks are cached as they fill."""
    scheduler = Scheduler(max_num_seqs=SEQUENCES, max_num_batched_tokens=512, num_blocks=20_000, block_size=16)
    for number in range(SEQUENCES):
        hashes = [number.to_bytes(8, "big") + at.to_bytes(8, "big") for at in range(300)]
        scheduler.add(f"s{number}", num_tokens=128, max_num_tokens=4096, block_hashes=hashes)

    def settle(batch: object) -> None:
        scheduler.update(batch, {item.id: 1 for item in batch.items if item.samples})  # type: ignore[attr-defined, arg-type]

    return microseconds(scheduler.schedule, settle)


def grant() -> float:
    """A turn, each time one of the running requests has left."""
    keeper = TurnKeeper(SEQUENCES)
    flows = [Backlog(f"t{n}", "standard", 1.0 + n % 7, 10**9, 0.0) for n in range(SEQUENCES)]
    keeper.backlog("gateway", flows, 0.0)
    guests: list[int] = []

    def settle(granted: object) -> None:
        for _, turn in granted:  # type: ignore[attr-defined]
            guests.append(turn.serial)
            keeper.arrived(turn.serial, turn[1:], 1.0, 1, 0.0, turn.serial)
        keeper.left(guests.pop(0), 100.0)

    settle(keeper.grants(0, 0, 0.0))
    return microseconds(lambda: keeper.grants(SEQUENCES, 0, 0.0), settle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    figures = [
        figure("a step of 64 running sequences, scheduled", schedule(), "us", 200, better="lower"),
        figure("a turn among 64 flows, granted", grant(), "us", 100, better="lower"),
    ]
    table = Table("decision", "median us", "goal", title=f"{cpu_name()}, {ROUNDS:,} rounds")
    for each in figures:
        table.add_row(each.name, f"{each.value:.1f}", each.goal)
    Console().print(table)
    write_json(options.json, {"bench": "policy", "cpu": cpu_name(), "versions": versions()}, figures)


if __name__ == "__main__":
    main()
