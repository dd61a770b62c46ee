"""Chaos with a real model: seeded streams have the same text whatever befalls the fleet while they run."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

from springtide.cli.lab.chaos import Report, read_records
from springtide.cli.lab.client import Client, Heard
from springtide.cli.lab.faults import Fault, Faults
from springtide.cli.lab.fleet import MODEL, Fleet, FleetPlan
from springtide.cli.lab.questions import PATHS
from springtide.core.errors import SpringtideError
from springtide.core.figures import Figure, figure

_STREAMS = 16
_TOKENS = 96


class Outcome(NamedTuple):
    """How many of the answers that were given without faults came out the same with them."""

    streams: int
    same: int
    seconds: float
    faults: list[Fault]
    attempts: int  # after the first ones
    differing: list[str]


async def run_real(
    directory: Path, source: str, model_dir: Path, report: Report, *, seconds: float, every: float, seed: int
) -> Outcome:
    """Sixteen seeded streams of a real model, again and again while faults befall the fleet.

    Raises:
        SpringtideError: the fleet does not come up, or can't answer even without faults.
    """
    report("starting a fleet with a real model", 0, None)
    plan = FleetPlan(agents=2, replicas=2, engine="springtide", source=source, settings={"model_dir": str(model_dir)})
    async with Fleet(directory, plan, seed) as fleet:
        bodies = [_body(number, seed) for number in range(_STREAMS)]
        report("without faults", 0, None)
        right = await _ask_all(fleet, bodies)
        if failed := [heard.error for heard in right if not heard.done]:
            raise SpringtideError(f"answers fail without any fault: {failed[:3]}")
        texts, faults = [_text(heard) for heard in right], Faults(fleet, seed)
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            group.create_task(faults.go_on(every, began + seconds))
            asked, differing = 0, list[str]()
            while (passed := time.monotonic() - began) < seconds:
                report("with faults", int(passed), int(seconds))
                answers = await _ask_all(fleet, bodies)
                asked += len(answers)
                differing += _differing(answers, texts)
        attempts = sum(max(0, len(record.attempts) - 1) for record in await read_records(fleet))
        return Outcome(asked, asked - len(differing), time.monotonic() - began, faults.done, attempts, differing)


def _differing(answers: list[Heard], texts: list[str]) -> list[str]:
    """Which have not the text that they should have."""
    return [
        f"stream {number}, {heard.id}: {heard.error or 'another text'}"
        for number, (heard, text) in enumerate(zip(answers, texts, strict=True))
        if not heard.done or _text(heard) != text
    ]


def _body(number: int, seed: int) -> bytes:
    chance = random.Random(f"{seed}/{number}")
    topic = chance.choice(("the sea", "a harbour", "the moon", "a lighthouse", "an old map", "tides", "a storm"))
    return msgspec.json.encode(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"Tell me a story about {topic}, number {number}."}],
            "max_tokens": _TOKENS,
            "ignore_eos": True,
            "seed": chance.getrandbits(40),
            "temperature": 0.8,
            "stream": True,
        }
    )


async def _ask_all(fleet: Fleet, bodies: list[bytes]) -> list[Heard]:
    client, ports = Client(fleet.key), [gateway.port for gateway in fleet.gateways]
    asking = [client.ask(ports[number % len(ports)], PATHS["chat"], body) for number, body in enumerate(bodies)]
    return list(await asyncio.gather(*asking))


def _text(heard: Heard) -> str:
    return "".join(heard.texts[0])


def figures(outcome: Outcome) -> list[Figure]:
    share = 100 * outcome.same / max(1, outcome.streams)
    return [figure("real model: texts as without faults", share, "%", 100.0)]
