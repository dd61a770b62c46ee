"""How far a replica is with its start, as a small file that others may read at any time."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import msgspec

logger = logging.getLogger(__name__)

_INTERVAL = 0.2  # seconds between two writes about the same thing


class ProgressFile:
    """`<data_dir>/progress/<replica>.json`: {"what", "done", "total", "ready"}, replaced whole each time. It may be
    called from any one thread; `total` None means that nobody knows."""

    def __init__(self, data_dir: Path, replica: str) -> None:
        self.path = data_dir / "progress" / f"{replica}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._what = ""
        self._written = 0.0
        self("starting", 0, None)

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Tell how far it is; seldom said twice in short order, but the last of it always."""
        now = time.monotonic()
        if what == self._what and done != total and now < self._written + _INTERVAL:
            return
        if what != self._what:
            logger.info("%s%s", what, f" ({total} in all)" if total else "")
        self._what, self._written = what, now
        self._write(what, done, total, ready=False)

    def ready(self) -> None:
        """It has started."""
        logger.info("ready")
        self._write("ready", 1, 1, ready=True)

    def _write(self, what: str, done: int, total: int | None, *, ready: bool) -> None:
        whole = msgspec.json.encode({"what": what, "done": done, "total": total, "ready": ready})
        part = self.path.with_suffix(".part")
        part.write_bytes(whole)
        part.replace(self.path)
