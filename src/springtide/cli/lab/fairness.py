"""Fairness under load: who is served how much, and who waits how long, when more is asked than can be done.

Two tenants, each with gateways of its own (as skewed as ingress can be), fill a fleet of mocks with streams. Tokens
are counted as they reach the clients, in a window after all have warmed up.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from springtide.cli.lab.chaos import Report, percentile
from springtide.cli.lab.client import Client, Heard
from springtide.cli.lab.fleet import Fleet, FleetPlan
from springtide.cli.lab.questions import Question, Questions
from springtide.core.figures import Figure, figure

SLOTS = 16  # sequences that a replica runs at once
STEP_MS = 40.0
WEIGHT = 4.0  # of the heavy tenant; the other has 1
TOLERANCE = 0.05
AGGRESSION = 100
_DEPTH = 3  # streams of each tenant for each slot of the fleet: always more than can run
_TOKENS = (16, 48)
_ENDLESS = 8000  # tokens


class FairnessPlan(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds` is how long each window lasts, after `warm_up`. `shapes`: gateways in use, and replicas."""

    seconds: float = 60.0
    warm_up: float = 5.0
    seed: int = 1
    shapes: tuple[tuple[int, int], ...] = ((1, 1), (2, 1), (4, 1), (1, 4), (2, 4), (4, 4))
    aggression: bool = True
    slots: int = SLOTS
    step_ms: float = STEP_MS

    @property
    def fleet(self) -> FleetPlan:
        gateways = max(gateways for gateways, _ in self.shapes)
        replicas = max(replicas for _, replicas in self.shapes)
        options = {"step_base_ms": self.step_ms, "max_num_seqs": self.slots}
        return FleetPlan(gateways=gateways, agents=min(2, replicas), replicas=replicas, options=options)


class Crowd:
    """Streams of one tenant, one question after another on each. `failed` says what went wrong with some."""

    def __init__(self, key: str, ports: list[int], streams: int, seed: int, tokens: tuple[int, int] = _TOKENS) -> None:
        self.failed: list[str] = []
        self._client = Client(key)
        self._ports = ports
        self._streams = streams
        self._questions = Questions(seed, tokens)
        self._heard: list[Heard] = []

    async def ask(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._streams):
                group.create_task(self._ask_on(self._ports[number % len(self._ports)]))

    async def _ask_on(self, port: int) -> None:
        while True:
            question = _plain(self._questions.next())
            heard = Heard(sent=time.time())
            self._heard.append(heard)
            await self._client.ask(port, question.path, question.body, heard=heard)
            if heard.error is not None:
                self.failed.append(heard.error)
                await asyncio.sleep(0.5)

    def tokens(self, since: float, until: float) -> int:
        """How many arrived between two times."""
        return sum(since <= at < until for heard in self._heard for at in heard.times)

    def waits(self, since: float, until: float) -> list[float]:
        """Seconds to the first token, in order, where that came between two times."""
        found = (heard.first_after for heard in self._heard if heard.times and since <= heard.times[0] < until)
        return sorted(seconds for seconds in found if seconds is not None)


def _plain(question: Question) -> Question:
    """Of one choice, which comes a token an event; and of a prompt that is as good as none, and so short that no cache
    holds it: what prompts cost is not what is measured here."""
    return replace(question, prompt="why?", dialect="completions", stream=True, n=1, stop=None, logprobs=False)


class Share(NamedTuple):
    """What two tenants of weights 4:1 were served."""

    gateways: int
    replicas: int
    heavy: int
    light: int
    seconds: float
    failed: list[str]

    @property
    def ratio(self) -> float:
        return self.heavy / max(1, self.light)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return (self.heavy + self.light) / self.seconds


class Calm(NamedTuple):
    """How long a tenant waits for its first tokens (seconds, in order): beside one that asks as much, and beside one
    that asks a hundred times as much. `alone`: the tokens a second of a single tenant that fills the fleet by itself,
    in whose line nobody has to be fair; `both`: of the two of unequal load."""

    beside_equal: list[float]
    beside_aggressive: list[float]
    alone: float
    both: float
    failed: list[str]

    @property
    def ratio(self) -> float:
        return percentile(self.beside_aggressive, 0.99) / percentile(self.beside_equal, 0.99)


class FairnessOutcome(NamedTuple):
    plan: FairnessPlan
    shares: list[Share]
    calm: Calm | None
    capacity: dict[int, float]  # tokens a second that so many replicas can do, as measured

    def used(self, share: Share) -> float:
        """Of what the engines can do."""
        return share.rate / self.capacity[share.replicas]


async def run_fairness(directory: Path, plan: FairnessPlan, report: Report) -> FairnessOutcome:
    """Raises SpringtideError: the fleet does not come up."""
    report("starting a fleet", 0, None)
    async with Fleet(directory, plan.fleet, plan.seed) as fleet:
        bench = _Bench(fleet, plan, report)
        shares = [await bench.share(*shape) for shape in sorted(plan.shapes, key=lambda shape: shape[1])]
        calm = await bench.calm() if plan.aggression else None
        # Last: its endless requests would give a wrong idea of what requests cost.
        capacity = {replicas: await bench.capacity(replicas) for replicas in sorted({r for _, r in plan.shapes})}
        return FairnessOutcome(plan, shares, calm, capacity)


class _Bench:
    def __init__(self, fleet: Fleet, plan: FairnessPlan, report: Report) -> None:
        self._fleet = fleet
        self._plan = plan
        self._report = report
        self._keys: dict[tuple[str, float], str] = {}
        self._ports = [gateway.port for gateway in fleet.gateways]

    async def share(self, gateways: int, replicas: int) -> Share:
        await self._scale(replicas)
        ports = self._ports[:gateways]
        half = max(1, gateways // 2)
        streams = _DEPTH * self._plan.slots * replicas
        heavy = await self._crowd("heavy", WEIGHT, ports[:half], streams)
        light = await self._crowd("light", 1.0, ports[-half:], streams)
        what = f"weights {WEIGHT:g}:1, {gateways} gateways, {replicas} replicas"
        window = await self._window(what, heavy, light)
        return Share(
            gateways=gateways,
            replicas=replicas,
            heavy=heavy.tokens(*window),
            light=light.tokens(*window),
            seconds=window[1] - window[0],
            failed=heavy.failed + light.failed,
        )

    async def calm(self) -> Calm:
        """One replica, each tenant at a gateway of its own."""
        await self._scale(1)
        streams = self._plan.slots
        mine, theirs = self._ports[:1], self._ports[-1:]
        waits, rates, failed = [], [], []
        for number, load in enumerate((streams, AGGRESSION * streams)):
            quiet = await self._crowd("quiet", 1.0, mine, streams)
            other = await self._crowd(f"other-{number}", 1.0, theirs, load)
            window = await self._window(f"beside a tenant with {load} streams", quiet, other)
            waits.append(quiet.waits(*window))
            rates.append((quiet.tokens(*window) + other.tokens(*window)) / (window[1] - window[0]))
            failed += quiet.failed + other.failed
        alone = await self._crowd("alone", 1.0, mine, _DEPTH * streams)
        window = await self._window("one tenant alone", alone)
        rate = alone.tokens(*window) / (window[1] - window[0])
        return Calm(waits[0], waits[1], alone=rate, both=rates[1], failed=failed + alone.failed)

    async def capacity(self, replicas: int) -> float:
        """Tokens a second with a stream on each slot and none that ends or waits. Nothing that hands slots from one to
        the next can do better, fair or not."""
        await self._scale(replicas)
        key = await self._key("capacity", 1.0)
        endless = Crowd(key, self._ports, self._plan.slots * replicas, self._plan.seed, (_ENDLESS, _ENDLESS))
        since, until = await self._window(f"capacity of {replicas} replicas", endless)
        return endless.tokens(since, until) / (until - since)

    async def _crowd(self, tenant: str, weight: float, ports: list[int], streams: int) -> Crowd:
        return Crowd(await self._key(tenant, weight), ports, streams, self._plan.seed)

    async def _key(self, tenant: str, weight: float) -> str:
        if (tenant, weight) not in self._keys:
            body = {"tenant": tenant, "name": tenant, "weight": weight}
            self._keys[tenant, weight] = (await self._fleet.admin("POST", "/keys", body))["key"]
            await asyncio.sleep(1.0)  # until every gateway has heard of it
        return self._keys[tenant, weight]

    async def _window(self, what: str, *crowds: Crowd) -> tuple[float, float]:
        """Let the crowds ask; the window's beginning and end, unix seconds. Afterwards nothing runs any more."""
        plan = self._plan
        asking = [asyncio.get_running_loop().create_task(crowd.ask()) for crowd in crowds]
        try:
            await self._pass(what, plan.warm_up)
            since = time.time()
            await self._pass(what, plan.seconds)
            until = time.time()
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        await self._fleet.until(self._is_quiet, "the fleet is idle again")
        return since, until

    async def _pass(self, what: str, seconds: float) -> None:
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds:
            self._report(what, int(passed), int(seconds))
            await asyncio.sleep(min(0.5, seconds - passed))

    async def _is_quiet(self) -> bool:
        status = await self._fleet.admin("GET", "/status")
        return all(replica["load"]["running"] == 0 for replica in status["replicas"])

    async def _scale(self, replicas: int) -> None:
        await self._fleet.scale(replicas)

        async def right() -> bool:
            status = await self._fleet.admin("GET", "/status")
            return [r["state"] for r in status["replicas"]] == ["ready"] * replicas

        await self._fleet.until(right, f"{replicas} replicas")


def figures(outcome: FairnessOutcome) -> list[Figure]:
    """The promises, held against what was measured."""
    entries: list[Figure] = []
    for share in outcome.shares:
        where = f"{share.gateways} gateways, {share.replicas} replicas"
        low, high = WEIGHT * (1 - TOLERANCE), WEIGHT * (1 + TOLERANCE)
        goal = f"{low:g} to {high:g}"
        name = f"tokens at weights 4:1, {where}"
        entries.append(
            Figure(name=name, value=round(share.ratio, 3), unit="", goal=goal, holds=low <= share.ratio <= high)
        )
        entries.append(figure(f"of what the engines can do, {where}", 100 * outcome.used(share), "%", 98.0))
    if (calm := outcome.calm) is not None:
        if calm.beside_equal and calm.beside_aggressive:
            entries.append(figure("p99 TTFT beside 100x the load", calm.ratio, "x", 1.5, better="lower"))
        work = 100 * calm.both / max(calm.alone, 1e-9)
        entries.append(figure("tokens/s of two, of one tenant's alone", work, "%", 98.0))
    return entries


def row(outcome: FairnessOutcome) -> dict[str, Any]:
    """What a run has shown, as JSON."""
    shares = [
        {
            "gateways": share.gateways,
            "replicas": share.replicas,
            "seconds": round(share.seconds, 1),
            "heavy_tokens": share.heavy,
            "light_tokens": share.light,
            "ratio": round(share.ratio, 3),
            "capacity_tokens_s": round(outcome.capacity[share.replicas], 1),
            "of_capacity": round(outcome.used(share), 4),
            "failed": share.failed[:5],
        }
        for share in outcome.shares
    ]
    return {"kind": "fairness", "shares": shares, "calm": _calm_row(outcome.calm)}


def _calm_row(calm: Calm | None) -> dict[str, Any] | None:
    if calm is None:
        return None
    beside = {"equal": calm.beside_equal, "aggressive": calm.beside_aggressive}
    waits = {
        name: {"requests": len(seconds), "p50": at(seconds, 0.5), "p99": at(seconds, 0.99)}
        for name, seconds in beside.items()
    }
    rates = {"alone_tokens_s": round(calm.alone, 1), "both_tokens_s": round(calm.both, 1)}
    return {"ttft_s": waits, **rates, "failed": calm.failed[:5]}


def at(ordered: list[float], share: float) -> float | None:
    """A percentile of values in order; None if there are none."""
    return round(percentile(ordered, share), 4) if ordered else None
