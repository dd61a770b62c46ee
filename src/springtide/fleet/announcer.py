"""What one replica says of itself in presence."""

from __future__ import annotations

from typing import Any

import msgspec

from springtide.core.cluster import Replica
from springtide.fabric.connection import Fabric
from springtide.fabric.presence import Heart


class Announcer:
    """Keeps a replica's description and beats its heart; every change is told at once."""

    def __init__(self, fabric: Fabric, replica: Replica) -> None:
        self.replica = replica
        self._heart = Heart(fabric, lambda: self.replica)

    async def start(self) -> None:
        await self._heart.start()

    async def stop(self, *, goodbye: bool = True) -> None:
        """Fall silent; without `goodbye` the last word stands until it is too old."""
        await self._heart.stop(goodbye)

    def update(self, **changes: Any) -> None:
        """Change fields of the description."""
        self.replica = msgspec.structs.replace(self.replica, **changes)
        self._heart.beat_now()
