"""The first key of a machine."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from springtide.core.errors import SetupError
from springtide.ledger.first_key import ensure_first_key
from springtide.ledger.keys import hash_key
from springtide.ledger.store import Ledger


async def test_it_is_made_once_and_the_same_at_each_start(ledger: Ledger, tmp_path: Path) -> None:
    first = await ensure_first_key(ledger, tmp_path)
    again = await ensure_first_key(ledger, tmp_path)
    assert first == again and first.note is None
    assert stat.S_IMODE((tmp_path / "api_key").stat().st_mode) == 0o600
    (record,) = await ledger.key_records()
    assert record.hash == hash_key(first.key) and record.tenant.name == "default"


async def test_starts_at_the_same_time_agree(ledger: Ledger, tmp_path: Path) -> None:
    keys = await asyncio.gather(*(ensure_first_key(ledger, tmp_path) for _ in range(5)))
    assert len({key.key for key in keys}) == 1
    assert len(await ledger.list_keys()) == 1


async def test_a_revoked_one_is_replaced_and_said_so(ledger: Ledger, tmp_path: Path) -> None:
    first = await ensure_first_key(ledger, tmp_path)
    await ledger.revoke_key((await ledger.list_keys())[0].id)
    second = await ensure_first_key(ledger, tmp_path)
    assert second.key != first.key and second.note is not None and "was revoked" in second.note
    assert (await ensure_first_key(ledger, tmp_path)).key == second.key
    assert stat.S_IMODE((tmp_path / "api_key").stat().st_mode) == 0o600


async def test_a_lost_file_gives_a_new_one_and_says_that_the_old_one_works(ledger: Ledger, tmp_path: Path) -> None:
    await ensure_first_key(ledger, tmp_path)
    (tmp_path / "api_key").unlink()
    second = await ensure_first_key(ledger, tmp_path)
    assert second.note is not None and "was missing" in second.note
    assert [key.revoked for key in await ledger.list_keys()] == [None, None]


async def test_a_file_that_holds_something_else_is_replaced(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "api_key").write_text("hello\n")
    first = await ensure_first_key(ledger, tmp_path)
    assert first.key.startswith("sk-") and first.note is not None and "held no API key" in first.note


async def test_a_new_ledger_takes_the_key_that_the_file_has(ledger: Ledger, tmp_path: Path) -> None:
    first = await ensure_first_key(ledger, tmp_path)
    other = await Ledger.open(f"sqlite:///{tmp_path}/other.db")
    assert (await ensure_first_key(other, tmp_path)).key == first.key
    assert [record.hash for record in await other.key_records()] == [hash_key(first.key)]
    await other.close()


async def test_a_file_open_to_others_is_closed(ledger: Ledger, tmp_path: Path) -> None:
    first = await ensure_first_key(ledger, tmp_path)
    os.chmod(tmp_path / "api_key", 0o644)
    assert (await ensure_first_key(ledger, tmp_path)).key == first.key
    assert stat.S_IMODE((tmp_path / "api_key").stat().st_mode) == 0o600


async def test_a_data_dir_that_cannot_be_used_is_named(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "api_key").write_text("")
    with pytest.raises(SetupError, match="is empty"):
        await ensure_first_key(ledger, tmp_path)
    with pytest.raises(SetupError, match="can't write"):
        await ensure_first_key(ledger, tmp_path / "no folder")
