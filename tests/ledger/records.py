"""Usage records for tests."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from springtide.core.request import Attempt, Usage

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC).timestamp()


def attempt(number: int, **fields: Any) -> Attempt:
    defaults: dict[str, Any] = {
        "number": number,
        "node": f"node-{number}",
        "replica": f"replica-{number}",
        "started": NOON,
        "ended": NOON + 2,
        "outcome": "finished",
        "prompt_tokens": 10,
        "completion_tokens": 5,
    }
    return Attempt(**{**defaults, **fields})


def usage(request_id: str, **fields: Any) -> Usage:
    defaults: dict[str, Any] = {
        "request_id": request_id,
        "tenant": "tenant-1",
        "key_id": "key-1",
        "model": "smollm2",
        "gateway": "gw-1",
        "created": NOON,
        "finished": NOON + 2.5,
        "outcome": "finished",
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "cached_tokens": 4,
        "first_token_s": 0.25,
        "attempts": [attempt(1)],
    }
    return Usage(**{**defaults, **fields})
