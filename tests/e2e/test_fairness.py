"""Two tenants of weights 4:1 want more than there is, each through gateways of its own: real processes, for a moment.

That shares hold to a few percent over a minute is the benchmark's to show; here, that weights count across gateways
and that nobody starves.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from springtide.cli.lab.fairness import FairnessPlan, run_fairness
from tests.e2e.test_chaos import quiet

pytestmark = pytest.mark.e2e


async def test_weights_count_through_one_gateway_and_through_two(tmp_path: Path) -> None:
    plan = FairnessPlan(seconds=10, shapes=((1, 1), (2, 1)), aggression=False, slots=8)
    outcome = await run_fairness(tmp_path, plan, quiet)
    for share in outcome.shares:
        assert not share.failed, share.failed[:3]
        assert 3 < share.ratio < 5.5, share
