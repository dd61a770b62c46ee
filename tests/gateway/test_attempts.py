"""A request that is refused again and again: each attempt is a fact, and all of them reach the ledger."""

from __future__ import annotations

import pytest

from springtide.core.errors import Overloaded
from springtide.core.request import End, Request, TokenCounts
from springtide.fabric.streams import StreamKey
from springtide.gateway import dispatch
from tests.gateway.conftest import Edge
from tests.gateway.replica import TinyReplica, speak

REFUSALS = 300  # those of ten minutes, at one every two seconds


async def test_every_attempt_of_a_long_wait_is_in_the_ledger(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_LONGEST_BACKOFF_S", 0.001)

    async def refuse_long(replica: TinyReplica, key: StreamKey, request: Request) -> None:
        if len(replica.opened) > REFUSALS:
            return await speak(replica, key, request)
        await replica.emit(key, [], End("failed", TokenCounts(), Overloaded("full").to_wire()))

    edge.replica.behaviour = refuse_long
    response = await edge.chat()
    assert response.status_code == 200, response.text
    usage = await edge.cloud.usage(edge.replica.opened[0][0].request_id)
    assert [attempt.number for attempt in usage.attempts] == list(range(1, REFUSALS + 2))
    assert [attempt.outcome for attempt in usage.attempts] == ["failed"] * REFUSALS + ["finished"]
