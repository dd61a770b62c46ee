"""The first API key of a machine: made once, kept readable by its owner, shown at each start."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import msgspec

from springtide.core.ids import new_api_key
from springtide.fabric.files import write_private
from springtide.ledger.keys import DEFAULT_TENANT
from springtide.ledger.private_file import read_or_create
from springtide.ledger.store import Ledger

KEY_FILE = "api_key"
_KEY = re.compile(r"sk-[0-9a-z]{32}")


class FirstKey(msgspec.Struct, frozen=True, kw_only=True):
    """`note` is a sentence for the person who starts us, when the key is not the one of the last start."""

    key: str
    note: str | None = None


async def ensure_first_key(ledger: Ledger, data_dir: Path) -> FirstKey:
    """The key in `data_dir/api_key`, which works. Made, with the tenant "default", if there is none.

    The file comes first and the ledger second, and a key that the ledger does not know is registered: so a
    start that was cut short between the two, or a new database, is made good by the next start.

    Raises:
        SetupError: the file can't be read or written.
    """
    await ledger.put_tenant(DEFAULT_TENANT)
    path, name = data_dir / KEY_FILE, _key_name()
    lost = not path.exists() and any(key.name == name and not key.revoked for key in await ledger.list_keys())
    key = read_or_create(path, new_api_key)
    if not _KEY.fullmatch(key):
        return await _renew(ledger, path, f"{path} held no API key: here is a new one")
    if (await ledger.add_key(key, _key_name())).revoked:
        return await _renew(ledger, path, f"the key in {path} was revoked: here is a new one")
    note = f"{path} was missing: here is a new key; the old one works until it is revoked" if lost else None
    return FirstKey(key=key, note=note)


def _key_name() -> str:
    """Says which machine it was made for: several may share one ledger."""
    return f"first key of {platform.node() or 'this machine'}"


async def _renew(ledger: Ledger, path: Path, note: str) -> FirstKey:
    key = new_api_key()
    write_private(path, f"{key}\n".encode())
    await ledger.add_key(key, _key_name())
    return FirstKey(key=key, note=note)
