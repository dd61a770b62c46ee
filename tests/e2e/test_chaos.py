"""A short chaos: replicas, agents, lines and the fabric fail while a crowd asks. Every answer is whole, every bill is
right.

How long anything takes is not asserted, only that nothing is lost.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from springtide.cli.lab.chaos import ChaosPlan, Outcome, run_chaos
from springtide.cli.lab.fleet import processes_that_name

pytestmark = pytest.mark.e2e


def quiet(what: str, done: int, total: int | None) -> None:
    pass


def check(outcome: Outcome, directory: Path) -> None:
    wrong = [(one.heard.id, one.verdict) for one in outcome.asked if not one.verdict.right]
    assert not wrong, wrong[:5]
    bills = outcome.bills
    assert not (bills.missing or bills.double or bills.wrong or bills.unknown), bills
    assert not outcome.surprises, outcome.surprises
    assert not processes_that_name(str(directory)), "it left something behind"


@pytest.mark.parametrize("fabric_servers", [1, 3])
async def test_nothing_is_lost_in_chaos(tmp_path: Path, fabric_servers: int) -> None:
    plan = ChaosPlan(seconds=15, every=1.5, streams=24, seed=3, fabric_servers=fabric_servers, tokens=(20, 80))
    outcome = await run_chaos(tmp_path, plan, quiet)
    check(outcome, tmp_path)
    assert len(outcome.faults) >= 5 and len({fault.kind for fault in outcome.faults}) >= 3
    assert outcome.attempts_lost, "no fault hit anybody"


async def test_an_answer_outlives_its_gateway(tmp_path: Path) -> None:
    """Clients that come again with their key, at another gateway, get the same answer, and pay for it once."""
    plan = ChaosPlan(seconds=12, every=2, streams=16, seed=3, gateways=True, tokens=(20, 80))
    outcome = await run_chaos(tmp_path, plan, quiet)
    check(outcome, tmp_path)
    assert len(outcome.faults) >= 2
    assert sum(one.heard.connections for one in outcome.asked) > len(outcome.asked), "no client had to come again"
