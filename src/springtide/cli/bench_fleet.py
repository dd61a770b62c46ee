"""Whether nothing is lost and everybody gets a fair share, on a whole fleet of real processes on this machine.

All that is measured is the platform's own doing; but clients, fabric and engines share the cores, so times are longer
than on machines of their own.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

from springtide.cli.lab import chaos, fairness, real
from springtide.cli.lab.chaos import ChaosPlan, Outcome, Report
from springtide.cli.lab.fairness import FairnessOutcome, FairnessPlan
from springtide.cli.lab.fleet import check_linux
from springtide.cli.progress import Bar
from springtide.core.figures import Figure, cpu_name, versions, write_json

CHAOS_S = 300.0
GATEWAY_KILLS_S = 60.0
FAIRNESS_S = 60.0
REAL_EVERY_S = 30.0

T = TypeVar("T")


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be run. `only`: chaos, gateways or fairness; None: all. `seconds` None: what each needs."""

    only: str | None = None
    seconds: float | None = None
    seed: int = 1
    streams: int = 200
    every: float | None = None
    fabric_servers: int = 1
    engine: str = "mock"
    model: str = ""
    model_dir: Path = Path()


def run(choice: Choice, json_file: Path | None) -> None:
    """Run, print the tables, write the JSON.

    Raises:
        SpringtideError: a fleet can't be started here.
    """
    check_linux()
    rows: list[dict[str, Any]] = []
    figures: list[Figure] = []
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        for one in _runs(choice):
            found = one(console)
            rows.append(found[0])
            figures += found[1]
    except KeyboardInterrupt:
        console.print("interrupted; nothing is left running")
        raise
    for entry in figures:
        word = "holds" if entry.holds else "NOT MEASURED" if entry.holds is None else "FALLS SHORT"
        console.print(
            f"{word}: {entry.name}: {entry.value} {entry.unit} ({entry.reason or entry.goal})", highlight=False
        )
    result = {"bench": "fleet", "cpu": cpu_name(), "cores": os.cpu_count(), "versions": versions("granian", "nats-py")}
    write_json(json_file, {**result, "rows": rows}, figures)


Found = tuple[dict[str, Any], list[Figure]]


def _runs(choice: Choice) -> list[Callable[[Console], Found]]:
    if choice.engine == "springtide":
        return [lambda console: _real(choice, console)]
    runs = {
        "chaos": lambda console: _chaos(choice, console, gateways=False),
        "gateways": lambda console: _chaos(choice, console, gateways=True),
        "fairness": lambda console: _fairness(choice, console),
    }
    return [one for name, one in runs.items() if choice.only in (None, name)]


def _chaos(choice: Choice, console: Console, *, gateways: bool) -> Found:
    plan = ChaosPlan(
        seconds=choice.seconds or (GATEWAY_KILLS_S if gateways else CHAOS_S),
        every=choice.every or 2.0,
        streams=choice.streams,
        seed=choice.seed,
        fabric_servers=choice.fabric_servers,
        gateways=gateways,
    )
    outcome = _in_a_fleet(lambda directory, report: chaos.run_chaos(directory, plan, report))
    row = chaos.row(outcome)
    _print_chaos(console, outcome, row)
    return row, chaos.figures(outcome)


def _real(choice: Choice, console: Console) -> Found:
    seconds, every = choice.seconds or CHAOS_S, choice.every or REAL_EVERY_S
    outcome = _in_a_fleet(
        lambda directory, report: real.run_real(
            directory, choice.model, choice.model_dir, report, seconds=seconds, every=every, seed=choice.seed
        )
    )
    row = {"kind": "chaos, real model", "model": choice.model, **outcome._asdict()}
    row["faults"] = [fault._asdict() for fault in outcome.faults]
    console.print(
        f"{outcome.streams} streams of {choice.model}, {len(outcome.faults)} faults, {outcome.attempts} attempts after "
        f"the first ones: {outcome.same} texts as without faults",
        highlight=False,
    )
    return row, real.figures(outcome)


def _fairness(choice: Choice, console: Console) -> Found:
    plan = FairnessPlan(seconds=choice.seconds or FAIRNESS_S, seed=choice.seed)
    outcome = _in_a_fleet(lambda directory, report: fairness.run_fairness(directory, plan, report))
    row = fairness.row(outcome)
    _print_fairness(console, outcome)
    return row, fairness.figures(outcome)


def _in_a_fleet(work: Callable[[Path, Report], Awaitable[T]]) -> T:
    """Run in a directory that is gone afterwards, with a line that says how far it is."""
    import uvloop

    async def main() -> T:
        with tempfile.TemporaryDirectory(prefix="springtide-fleet-", ignore_cleanup_errors=True) as path, Bar() as bar:
            return await work(Path(path), bar.update)

    return uvloop.run(main())


def _print_chaos(console: Console, outcome: Outcome, row: dict[str, Any]) -> None:
    servers = f"{row['fabric_servers']} fabric server{'s' if row['fabric_servers'] > 1 else ''}"
    title = f"{row['kind']}: {row['streams']} streams, {row['seconds']} s, {servers}, seed {row['seed']}"
    _table(
        console,
        title,
        ["requests", "streamed", "tokens", "connections", "attempts lost", "streams resumed", "faults"],
        [[row[key] for key in ("requests", "streamed", "tokens", "connections", "attempts_lost", "streams_resumed")]
         + [len(outcome.faults)]],
    )  # fmt: skip
    gaps = {"all": row["resume_gap_s"], **row["resume_gaps_by_fault"]} if row["resume_gap_s"] else {}
    kinds = sorted(row["faults"])
    _table(
        console,
        "faults, and the silence in streams that lost an attempt by them (s)",
        ["fault", "times", "streams", "p50", "p99", "max"],
        [
            [kind, row["faults"].get(kind, "")]
            + [gaps.get(kind, {}).get(key, "") for key in ("streams", "p50", "p99", "max")]
            for kind in [*kinds, *(kind for kind in gaps if kind not in kinds)]
        ],
    )
    for wrong in row["wrong_answers"][:5]:
        console.print(f"wrong: {wrong}", highlight=False, soft_wrap=True)
    for surprise in row["surprises"][:5]:
        console.print(f"ended by itself: {surprise}", highlight=False)


def _print_fairness(console: Console, outcome: FairnessOutcome) -> None:
    _table(
        console,
        f"tokens served at weights 4:1, {outcome.plan.seconds:g} s each, every tenant at gateways of its own",
        ["gateways", "replicas", "heavy", "light", "ratio", "of capacity", "failed"],
        [
            [s.gateways, s.replicas, s.heavy, s.light, f"{s.ratio:.3f}", f"{outcome.used(s):.1%}", len(s.failed)]
            for s in outcome.shares
        ],
    )
    if (calm := outcome.calm) is not None:
        _table(
            console,
            "seconds to the first token of a tenant with as many streams as a replica has slots",
            ["beside", "requests", "p50", "p99"],
            [
                [name, len(seconds), f"{fairness.at(seconds, 0.5)}", f"{fairness.at(seconds, 0.99)}"]
                for name, seconds in (("an equal one", calm.beside_equal), ("100x its load", calm.beside_aggressive))
            ],
        )


def _table(console: Console, title: str, columns: list[str], rows: list[list[Any]]) -> None:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for one in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in one))
    console.print(table)
