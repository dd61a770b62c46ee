"""Opening a ledger: the same on both databases, by several processes at once, with errors that help."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text

from springtide.core.config import Settings
from springtide.core.errors import SetupError
from springtide.ledger.database import Database, database_url
from springtide.ledger.schema import metadata, tenants
from springtide.ledger.store import Ledger
from tests.ledger.postgres import Postgres

OPEN_LEDGER = """
import asyncio, sys
from springtide.ledger.store import Ledger

async def main():
    ledger = await Ledger.open(sys.argv[1])
    await ledger.put_tenant("default")
    await ledger.close()

asyncio.run(main())
"""


async def test_migrations_make_exactly_the_tables_that_the_code_uses(url: str) -> None:
    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    database = await Database.open(url)
    async with database.read() as connection:
        assert await connection.run_sync(differences) == []
    await database.close()


async def test_several_processes_may_open_a_new_ledger_at_once(url: str) -> None:
    command = [sys.executable, "-c", OPEN_LEDGER, url]
    openers = [await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE) for _ in range(3)]
    assert [((await opener.communicate())[1], opener.returncode) for opener in openers] == [(b"", 0)] * 3
    ledger = await Ledger.open(url)
    assert [tenant.name for tenant in await ledger.tenants()] == ["default"]
    await ledger.close()


async def test_several_ledgers_may_be_opened_at_once_in_one_process(postgres: Postgres, tmp_path: Path) -> None:
    urls = [f"sqlite:///{tmp_path}/a.db", f"sqlite:///{tmp_path}/b.db", postgres.new("beside")] * 2
    for ledger in await asyncio.gather(*map(Ledger.open, urls)):
        assert await ledger.tenants() == []
        await ledger.close()


async def test_a_second_open_keeps_what_is_there(url: str) -> None:
    first = await Ledger.open(url)
    tenant = await first.put_tenant("acme", weight=4.0)
    await first.close()
    second = await Ledger.open(url)
    assert await second.tenants() == [tenant]
    await second.close()


async def test_a_ledger_of_a_newer_version_is_left_alone(url: str) -> None:
    database = await Database.open(url)
    async with database.write(tenants) as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    await database.close()
    with pytest.raises(SetupError, match="changed by a newer Springtide"):
        await Ledger.open(url)


async def test_a_failed_transaction_leaves_nothing(url: str) -> None:
    database = await Database.open(url)
    with pytest.raises(ZeroDivisionError):
        async with database.write(tenants) as connection:
            row = "('t', 't', 1, 'any', '2026-03-01 00:00:00', '2026-03-01 00:00:00')"
            await connection.execute(text(f"INSERT INTO tenants VALUES {row}"))
            _ = 1 / 0
    async with database.read() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM tenants"))).scalar_one() == 0
    await database.close()


async def test_writers_wait_for_each_other(url: str) -> None:
    """Twenty read-then-write transactions side by side, from two open ledgers: none fails, none is lost."""
    first, second = await Ledger.open(url), await Ledger.open(url)
    await asyncio.gather(*(ledger.put_tenant(f"tenant {i}") for i in range(10) for ledger in (first, second)))
    assert len(await first.tenants()) == 10
    await first.close()
    await second.close()


async def test_sqlite_is_durable_checked_and_private(tmp_path: Path) -> None:
    old_mask = os.umask(0o022)
    try:
        database = await Database.open(f"sqlite:///{tmp_path}/new/ledger.db")
        async with database.write(tenants) as connection:
            pragmas = [
                (await connection.execute(text(f"PRAGMA {name}"))).scalar_one()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            ]
            row = "('k', 'nobody', 'n', 'h', 'x', '2026-03-01 00:00:00', NULL)"
            with pytest.raises(Exception, match="FOREIGN KEY"):
                await connection.execute(text(f"INSERT INTO api_keys VALUES {row}"))
            await connection.execute(text("DELETE FROM tenants"))
            files = list((tmp_path / "new").iterdir())
            assert {path.name for path in files} >= {"ledger.db", "ledger.db-wal"}
            assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
        assert pragmas == ["wal", 2, 1, 20_000]
        await database.close()
    finally:
        os.umask(old_mask)


async def test_a_restarted_postgres_is_found_again(postgres: Postgres) -> None:
    ledger = await Ledger.open(postgres.new("restarted"))
    tenant = await ledger.put_tenant("default")
    postgres.stop()
    postgres.start()
    assert await ledger.tenants() == [tenant]
    await ledger.close()


def test_without_a_url_the_ledger_is_a_file_in_the_data_dir(tmp_path: Path) -> None:
    odd = tmp_path / "a b?c#d%20"
    odd.mkdir()
    url = database_url(Settings(data_dir=str(odd)))
    ledger = asyncio.run(_opened(url))
    assert ledger and (odd / "ledger.db").exists()
    assert database_url(Settings(database_url="postgresql://db/x")) == "postgresql://db/x"


async def _opened(url: str) -> bool:
    await (await Ledger.open(url)).close()
    return True


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "not a URL"),
        ("mysql://host/name", "can't live in mysql"),
        ("sqlite://", "in memory would be lost"),
        ("sqlite:////dev/null/ledger.db", "can't be written"),
        ("postgresql://u:secret@127.0.0.1:1/x", "can't be opened"),
    ],
)
async def test_a_ledger_that_cannot_be_opened_says_why(url: str, message: str) -> None:
    with pytest.raises(SetupError, match=message) as raised:
        await Ledger.open(url)
    assert raised.value.hint
    assert "secret" not in str(raised.value)


async def test_a_broken_file_is_not_a_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"not a database, " * 100)
    with pytest.raises(SetupError, match="can't be opened: file is not a database"):
        await Ledger.open(f"sqlite:///{path}")


async def test_a_missing_postgres_database_is_named(postgres: Postgres) -> None:
    with pytest.raises(SetupError, match='"nowhere" does not exist'):
        await Ledger.open(postgres.url("st", "nowhere"))


async def test_a_file_that_another_process_holds_is_waited_for(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    ledger = await Ledger.open(url)
    holder = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    waiting = asyncio.create_task(ledger.put_tenant("default"))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    assert await ledger.tenants() == []  # readers need not wait
    holder.execute("COMMIT")
    holder.close()
    assert (await waiting).name == "default"
    await ledger.close()
