"""Secrets on disk: written whole or not at all, readable by their owner alone."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from springtide.core.errors import SetupError


def private_directory(path: Path) -> Path:
    """`path` as a directory of mode 0700, made if missing.

    Raises:
        SetupError: it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise SetupError(
            f"can't use the directory {path}: {error.strerror}", hint="choose a data dir that you may write"
        ) from None
    return path


def write_private(path: Path, data: bytes, *, replace: bool = True) -> bool:
    """Write `data` durably and atomically with mode 0600. Without `replace`, false if the file is there.

    Raises:
        SetupError: the folder is not writable, the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
        _sync_directory(path.parent)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        raise SetupError(f"can't write {path}: {error.strerror}", hint="is the data dir writable?") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
