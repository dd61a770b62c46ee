"""Which tests are quick: all but those that start servers or need the default model's weights."""

from __future__ import annotations

from pathlib import Path

import pytest

_SERVERS = {"fabric", "fleet", "gateway", "ledger"}  # rooms whose tests start real servers and processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).parent.name in _SERVERS:
            item.add_marker("servers")
