"""Chaos: a crowd asks a fleet one question after another while fault upon fault befalls it; then every answer and every
record of usage is held against what they must be.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from springtide.cli.lab.client import Client, Heard
from springtide.cli.lab.faults import Fault, Faults
from springtide.cli.lab.fleet import Fleet, FleetPlan
from springtide.cli.lab.questions import Question, Questions, Verdict, judge
from springtide.core.figures import Figure, figure
from springtide.core.request import Usage
from springtide.fleet.mock_text import WORD_LENGTH

STEP_MS = 60.0
_RECORDS_S = 60.0  # for the last records to arrive in the ledger
_PATIENCE_S = 120.0  # of a client that comes again with its key
_PAGE = 1000
_ON_ITS_WAY_S = 0.5  # what may still be heard after a fault
_UP_AGAIN_S = 3.0  # what was killed is there again after
_LONGEST = 10
Report = Callable[[str, int, int | None], None]


class ChaosPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How long, how many streams at once, a fault every how many seconds. `gateways`: they alone are hit, and clients
    come again with their idempotency keys. `tokens`: how long answers are."""

    seconds: float = 300.0
    every: float = 2.0
    streams: int = 200
    seed: int = 1
    fabric_servers: int = 1
    gateways: bool = False
    tokens: tuple[int, int] = (40, 200)
    step_ms: float = STEP_MS

    @property
    def fleet(self) -> FleetPlan:
        options = {"step_base_ms": self.step_ms, "max_num_seqs": max(8, math.ceil(self.streams / 2))}
        return FleetPlan(fabric_servers=self.fabric_servers, options=options)


class Asked(NamedTuple):
    """A question, what was heard, and what is wrong with that."""

    question: Question
    heard: Heard
    verdict: Verdict


@dataclass(slots=True)
class Bills:
    """What is wrong with the records of usage. Each entry names a request."""

    missing: list[str] = field(default_factory=list)
    double: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # other counts than were received, attempts that make no sense
    unknown: list[str] = field(default_factory=list)  # of requests that nobody made


class Gap(NamedTuple):
    """The longest silence in a stream that lost an attempt, when it began (unix seconds), and the first fault in it
    (None: none was near)."""

    seconds: float
    began: float
    fault: Fault | None


class Outcome(NamedTuple):
    """All that a run has shown."""

    plan: ChaosPlan
    seconds: float
    asked: list[Asked]
    bills: Bills
    faults: list[Fault]
    gaps: list[Gap]
    attempts_lost: int
    surprises: list[str]


async def run_chaos(directory: Path, plan: ChaosPlan, report: Report) -> Outcome:
    """Raises SpringtideError: the fleet does not come up, or its ledger can't be read."""
    report("starting a fleet", 0, None)
    async with Fleet(directory, plan.fleet, plan.seed) as fleet:
        faults = Faults(fleet, plan.seed, gateways=plan.gateways)
        began = time.monotonic()
        until = began + plan.seconds
        telling = asyncio.get_running_loop().create_task(_tell(report, plan, until))
        try:
            asked = await _crowd(fleet, plan, faults, until)
        finally:
            telling.cancel()
        seconds = time.monotonic() - began
        report("reading the ledger", 0, None)
        records = await _records(fleet, {one.heard.id for one in asked if one.heard.done and one.heard.id})
        return Outcome(
            plan=plan,
            seconds=seconds,
            asked=asked,
            bills=check_bills(asked, records),
            faults=faults.done,
            gaps=_gaps(asked, records, faults.done),
            attempts_lost=sum(max(0, len(record.attempts) - 1) for record in records),
            surprises=fleet.surprises,
        )


async def _tell(report: Report, plan: ChaosPlan, until: float) -> None:
    while True:
        done = min(plan.seconds, plan.seconds - (until - time.monotonic()))
        report("chaos", int(done), int(plan.seconds))
        await asyncio.sleep(1.0)


async def _crowd(fleet: Fleet, plan: ChaosPlan, faults: Faults, until: float) -> list[Asked]:
    """So many clients at once, until the time is over and the last of them has its answer."""
    questions, asked = Questions(plan.seed, plan.tokens), list[Asked]()
    client = Client(fleet.key)
    ports = [gateway.port for gateway in fleet.gateways]

    async def one(number: int) -> None:
        mine = ports[number % len(ports) :] + ports[: number % len(ports)]
        while time.monotonic() < until:
            question = questions.next()
            if plan.gateways:
                key = f"chaos-{plan.seed}-{question.seed}"
                heard = await client.ask_until_done(mine, question.path, question.body, key, patience=_PATIENCE_S)
            else:
                heard = await client.ask(mine[0], question.path, question.body)
            asked.append(Asked(question, heard, judge(question, heard)))
            if heard.error is not None:
                await asyncio.sleep(0.5)  # as a client would, and lest one that fails asks most often

    async with asyncio.TaskGroup() as group:
        group.create_task(faults.go_on(plan.every, until))
        for number in range(plan.streams):
            group.create_task(one(number))
    return asked


# ---------------------------------------------------------------------------------------------------------------
# The ledger.


async def _records(fleet: Fleet, wanted: set[str]) -> list[Usage]:
    """All records, once those that must be there are, or have had their time."""
    deadline = time.monotonic() + _RECORDS_S
    while True:
        records = await read_records(fleet)
        if wanted <= {record.request_id for record in records} or time.monotonic() > deadline:
            return records
        await asyncio.sleep(0.5)


async def read_records(fleet: Fleet) -> list[Usage]:
    """All that the ledger has."""
    records, before = [], ""
    while True:
        page = await fleet.admin("GET", f"/usage?by=request&limit={_PAGE}{before}")
        records += msgspec.convert(page["rows"], list[Usage])
        if page["next"] is None:
            return records
        before = f"&before={page['next']}"


def check_bills(asked: list[Asked], records: list[Usage]) -> Bills:
    """Hold the records against the answers. What a request left behind under its id and a suffix belongs to it."""
    bills = Bills()
    by_request: dict[str, list[Usage]] = {}
    for record in records:
        by_request.setdefault(record.request_id.partition(".")[0], []).append(record)
    for question, heard, _ in asked:
        if heard.id is None:
            continue
        mine = by_request.pop(heard.id, [])
        if not heard.done:
            continue  # that it was not answered is told elsewhere
        _check_bill(question, heard.id, mine, bills)
    bills.unknown = [
        request_id
        for request_id, mine in by_request.items()
        if any(record.completion_tokens and record.outcome == "finished" for record in mine)
    ]
    return bills


def _check_bill(question: Question, request_id: str, records: list[Usage], bills: Bills) -> None:
    finished = [record for record in records if record.outcome == "finished"]
    if not finished:
        bills.missing.append(request_id)
        return
    if len([record for record in records if record.completion_tokens]) > 1:
        bills.double.append(request_id)
    (record, *_) = finished
    owed = (len(question.prompt_ids), sum(question.expected(choice).tokens for choice in range(question.n)))
    if (record.prompt_tokens, record.completion_tokens) != owed:
        bills.wrong.append(f"{request_id}: {(record.prompt_tokens, record.completion_tokens)} instead of {owed}")
    elif trouble := _trouble_with_attempts(record):
        bills.wrong.append(f"{request_id}: {trouble}")


def _trouble_with_attempts(record: Usage) -> str | None:
    """Numbers grow, and together the attempts did at least what was delivered. The last one finished it, unless only
    its word that it had was lost."""
    attempts = record.attempts
    numbers = [attempt.number for attempt in attempts]
    if not numbers or numbers != sorted(set(numbers)):
        return f"attempts {numbers}"
    if sum(attempt.outcome == "finished" for attempt in attempts) > 1:
        return "two attempts finished"
    if sum(attempt.completion_tokens for attempt in attempts) < record.completion_tokens:
        return "attempts did less than was delivered"
    return None


def _gaps(asked: list[Asked], records: list[Usage], faults: list[Fault]) -> list[Gap]:
    """Of streams that had begun when they lost an attempt."""
    attempts = {record.request_id: record.attempts for record in records}
    gaps = []
    for question, heard, _ in asked:
        mine = attempts.get(heard.id or "", [])
        if question.stream and len(heard.times) > 1 and any(a.completion_tokens for a in mine[:-1]):
            began, seconds = heard.longest_silence()
            gaps.append(Gap(seconds, began, _fault_of(began, seconds, faults)))
    return gaps


def _fault_of(began: float, seconds: float, faults: list[Fault]) -> Fault | None:
    """The first fault of a silence, or just before it: what was on its way was still heard."""
    during = (fault for fault in faults if began - _ON_ITS_WAY_S < fault.at < began + seconds)
    return min(during, key=lambda fault: fault.at, default=None)


# ---------------------------------------------------------------------------------------------------------------
# Figures.


def figures(outcome: Outcome) -> list[Figure]:
    """The promises of a run, held against what it has shown."""
    asked, bills = outcome.asked, outcome.bills
    answered = [one for one in asked if one.heard.done]
    right = sum(one.verdict.right for one in asked)
    count = [
        ("requests without an answer", len(asked) - len(answered)),
        ("tokens lost", sum(one.verdict.lost for one in answered)),
        ("tokens doubled", sum(one.verdict.doubled for one in answered)),
        ("tokens of others", sum(one.verdict.foreign for one in answered)),
        ("answers otherwise wrong", sum(bool(one.verdict.faults) for one in answered)),
        ("answers without a bill", len(bills.missing)),
        ("answers billed twice", len(bills.double)),
        ("bills that are wrong", len(bills.wrong)),
        ("bills that are nobody's", len(bills.unknown)),
    ]
    entries = [figure("requests answered rightly", 100 * right / max(1, len(asked)), "%", 100.0)]
    entries += [figure(name, value, "", 0, better="lower") for name, value in count]
    return entries + ([] if outcome.plan.gateways else _gap_figures(outcome.gaps))


def _gap_figures(gaps: list[Gap]) -> list[Figure]:
    seconds = sorted(gap.seconds for gap in gaps)
    goals = (("p50", 0.5, 1.0), ("p99", 0.99, 5.0))
    if not seconds:
        reason = "no stream lost an attempt"
        return [
            Figure(name=f"resume gap {name}", value=None, unit="s", goal=f"<= {goal:g}", holds=None, reason=reason)
            for name, _, goal in goals
        ]
    return [
        figure(f"resume gap {name}", percentile(seconds, share), "s", goal, better="lower")
        for name, share, goal in goals
    ]


def percentile(ordered: list[float], share: float) -> float:
    """Of values in order."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _gaps_by_fault(gaps: list[Gap]) -> dict[str, dict[str, float]]:
    by_kind: dict[str, list[float]] = {}
    for gap in sorted(gaps, key=lambda gap: gap.seconds):
        by_kind.setdefault(gap.fault.kind if gap.fault else "none was near", []).append(gap.seconds)
    return {kind: _spread(seconds) for kind, seconds in sorted(by_kind.items())}


def _longest(gaps: list[Gap], faults: list[Fault]) -> list[dict[str, Any]]:
    """What was going on during the longest silences, of each moment one: with it one sees whether anybody could have
    gone on. Faults by when they began, seen from the silence's beginning, and how long they lasted."""
    told: list[dict[str, Any]] = []
    moments: list[float] = []
    for gap in sorted(gaps, key=lambda gap: gap.seconds, reverse=True):
        if all(abs(gap.began - moment) > 1.0 for moment in moments):
            moments.append(gap.began)
            during = [
                f"{fault.at - gap.began:+.1f} s: {fault.kind} {fault.victim} ({fault.seconds:.1f} s)"
                for fault in faults
                if gap.began - fault.seconds - _UP_AGAIN_S < fault.at < gap.began + gap.seconds
            ]
            told.append({"seconds": round(gap.seconds, 2), "faults": during})
    return told[:_LONGEST]


def _spread(ordered: list[float]) -> dict[str, float]:
    values = {"p50": percentile(ordered, 0.5), "p99": percentile(ordered, 0.99), "max": ordered[-1]}
    return {"streams": len(ordered), **{name: round(value, 3) for name, value in values.items()}}


def row(outcome: Outcome) -> dict[str, Any]:
    """What a run has shown, as JSON."""
    seconds = sorted(gap.seconds for gap in outcome.gaps)
    wrong = [one for one in outcome.asked if not one.verdict.right]
    return {
        "kind": "gateway kills" if outcome.plan.gateways else "chaos",
        "seed": outcome.plan.seed,
        "fabric_servers": outcome.plan.fabric_servers,
        "seconds": round(outcome.seconds, 1),
        "streams": outcome.plan.streams,
        "requests": len(outcome.asked),
        "streamed": sum(one.question.stream for one in outcome.asked),
        "tokens": sum(one.heard.characters for one in outcome.asked) // WORD_LENGTH,
        "connections": sum(one.heard.connections for one in outcome.asked),
        "faults": dict(Counter(fault.kind for fault in outcome.faults)),
        "attempts_lost": outcome.attempts_lost,
        "streams_resumed": len(seconds),
        "resume_gap_s": _spread(seconds) if seconds else None,
        "longest_resume_gaps": _longest(outcome.gaps, outcome.faults),
        "resume_gaps_by_fault": _gaps_by_fault(outcome.gaps),
        "wrong_answers": [
            {"id": one.heard.id, "faults": one.verdict.faults, "lost": one.verdict.lost}
            | {"doubled": one.verdict.doubled, "foreign": one.verdict.foreign, "sent": one.heard.sent}
            | {"body": one.question.body.decode()[:400]}
            for one in wrong[:20]
        ],
        "bills": {
            "missing": outcome.bills.missing[:20],
            "double": outcome.bills.double[:20],
            "wrong": outcome.bills.wrong[:20],
            "unknown": outcome.bills.unknown[:20],
        },
        "surprises": outcome.surprises,
    }
