"""A secret that a machine keeps in a file of its own. Knows how to keep it, not what it is for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from springtide.core.errors import SetupError
from springtide.fabric.files import write_private

log = logging.getLogger(__name__)


def read_or_create(path: Path, make: Callable[[], str]) -> str:
    """The secret in `path`; without such a file, `make()` becomes it, readable by its owner alone from the first
    moment. Of several processes that start at once, one creates it and the others read it.

    Raises:
        SetupError: the file can't be read or written, or is empty.
    """
    if not path.exists():
        write_private(path, f"{make()}\n".encode(), replace=False)
    try:
        if path.stat().st_mode & 0o077:
            log.warning("%s could be read by others; now by its owner alone", path)
            path.chmod(0o600)
        secret = path.read_text(errors="replace").strip()
    except OSError as error:
        raise SetupError(
            f"can't read {path}: {error.strerror}", hint="it must belong to you; or choose another --data-dir"
        ) from None
    if not secret:
        raise SetupError(f"{path} is empty", hint="delete it: a new one is made at the next start")
    return secret
