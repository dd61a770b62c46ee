"""A ledger worker as a process of its own, for tests that kill it: `consumer.py CREDENTIALS DATABASE_URL DIE`.

DIE says where it kills itself: "before-commit" (after it fetched), "in-commit" (all is inserted, nothing is
committed), "after-commit" (nothing is acknowledged), or "never".
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import event
from sqlalchemy.engine import Engine

from springtide.core.ids import new_id
from springtide.core.request import Usage
from springtide.fabric.connection import Fabric
from springtide.ledger.store import Ledger
from springtide.ledger.worker import LedgerWorker


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DyingLedger(Ledger):
    where = "never"

    async def record_usage(self, records: Sequence[Usage]) -> int:
        if records and self.where == "before-commit":
            die()
        if records and self.where == "in-commit":
            event.listen(Engine, "commit", die)
        new = await super().record_usage(records)
        if records and self.where == "after-commit":
            die()
        return new


async def main(credentials: str, url: str, where: str) -> None:
    fabric = await Fabric.connect(Path(credentials), name="consumer")
    await fabric.prepare()
    ledger = await DyingLedger.open(url)
    DyingLedger.where = where
    worker = LedgerWorker(ledger, fabric, new_id("worker"))
    await worker.start()
    await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
