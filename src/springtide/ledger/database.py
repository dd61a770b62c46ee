"""One database behind the ledger: SQLite in a file, or PostgreSQL. Knows how to open, migrate and lock it; knows
no tenant and no usage."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Table, event, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from springtide.core.config import Settings
from springtide.core.errors import SetupError

_LOCK_WAIT_S = 20.0
_ANSWER_WAIT_S = 60.0
_MIGRATION_LOCK = 0x5370_7269_6E67_7469  # "Springti" in ASCII: a number that is ours, for pg_advisory_xact_lock
# What migrations import from Alembic (`op`, `context`) is one for the whole process: one migration at a time.
_alembic = threading.Lock()
_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
}


def database_url(settings: Settings) -> str:
    """Where the ledger of this machine lies: `database_url`, or `ledger.db` in the data dir."""
    if settings.database_url:
        return settings.database_url
    return URL.create("sqlite", database=str(settings.data_path / "ledger.db")).render_as_string()


class Database:
    """An open, migrated database. Any number of processes may open the same one at once."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._is_sqlite = engine.dialect.name == "sqlite"

    @classmethod
    async def open(cls, url: str) -> Database:
        """Connect, and bring the tables to this version's shape.

        Raises:
            SetupError: no such kind of database, its driver is not installed, it can't be reached or written,
                or a newer version of Springtide has already changed it.
        """
        target = _target(url)
        shown = target.render_as_string(hide_password=True)
        try:
            database = cls(_engine(target))
        except ModuleNotFoundError as error:
            raise SetupError(
                f"the ledger {shown} needs the Python package {error.name}",
                hint="pip install 'springtide[postgres]'",
            ) from None
        try:
            await database._migrate()
        except BaseException as error:
            await database.close()
            if isinstance(error, CommandError):  # Alembic: the tables' revision is none of ours
                raise SetupError(
                    f"the ledger {shown} was changed by a newer Springtide: {error}",
                    hint="install that version again, or use another database_url",
                ) from error
            if isinstance(error, SetupError) or not isinstance(error, Exception):
                raise
            raise SetupError(  # each driver has errors of its own, and those of the socket come through bare
                f"the ledger {shown} can't be opened: {_first_line(error)}",
                hint="check database_url, that the server runs, and that the folder can be written",
            ) from error
        return database

    async def close(self) -> None:
        await self._engine.dispose()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only reads: one snapshot on SQLite, committed data on PostgreSQL."""
        async with self._engine.begin() as connection:
            yield connection

    @asynccontextmanager
    async def write(self, *tables: Table) -> AsyncIterator[AsyncConnection]:
        """A transaction in which nobody else writes `tables`: what it reads there stays true until it commits.

        So "insert what is not there yet" is a select and an insert, alike on both databases. (RETURNING would
        say it in one statement, but the SQLite of some current Linux releases is too old for it.)
        """
        async with self._engine.connect() as connection:
            await connection.execution_options(springtide_write=True)
            async with connection.begin():
                if not self._is_sqlite:
                    names = ", ".join(f'"{table.name}"' for table in tables)
                    await connection.execute(text(f"LOCK TABLE {names} IN SHARE ROW EXCLUSIVE MODE"))
                yield connection

    async def _migrate(self) -> None:
        """Run what is missing, all or nothing; a second process waits for the first and finds nothing to do."""
        if self._is_sqlite:
            await self._use_wal()
        while not _alembic.acquire(blocking=False):  # noqa: ASYNC110  # its holder may be on another loop
            await asyncio.sleep(0.01)
        try:
            async with self._engine.connect() as connection:
                await connection.execution_options(springtide_write=True)
                async with connection.begin():
                    if not self._is_sqlite:
                        await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
                    await connection.run_sync(_upgrade)
        finally:
            _alembic.release()

    async def _use_wal(self) -> None:
        """Readers and one writer side by side. The file remembers it.

        Changing over needs the file alone, and SQLite then fails at once rather than wait its busy time: so we
        wait for another process that is doing the same.
        """
        loop = asyncio.get_running_loop()
        give_up = loop.time() + _LOCK_WAIT_S
        while True:
            try:
                async with self._engine.connect() as connection:
                    driver = (await connection.get_raw_connection()).driver_connection
                    assert driver is not None
                    await driver.execute("PRAGMA journal_mode=WAL")
                return
            except (SQLAlchemyError, sqlite3.OperationalError) as error:
                if "locked" not in str(error) or loop.time() > give_up:
                    raise
                await asyncio.sleep(0.05)


def _target(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise SetupError(
            "database_url is not a URL", hint="like sqlite:////var/lib/springtide/ledger.db or postgresql://host/name"
        ) from None
    driver = _DRIVERS.get(parsed.drivername)
    if driver is None:
        raise SetupError(f"the ledger can't live in {parsed.drivername}", hint="use sqlite or postgresql")
    if driver.startswith("sqlite") and parsed.database in (None, "", ":memory:"):
        raise SetupError("a ledger in memory would be lost", hint="name a file: sqlite:////path/ledger.db")
    return parsed.set(drivername=driver)


def _engine(target: URL) -> AsyncEngine:
    if target.drivername == "postgresql+asyncpg":
        # A connection may have died with a restarted server: ask before use. One to a server that vanished would
        # be silent for a quarter of an hour.
        patience = {"timeout": _LOCK_WAIT_S, "command_timeout": _ANSWER_WAIT_S}
        return create_async_engine(target, pool_pre_ping=True, connect_args=patience)
    assert target.database is not None
    _make_private_file(Path(target.database))
    engine = create_async_engine(target, connect_args={"timeout": _LOCK_WAIT_S})
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _make_private_file(path: Path) -> None:
    """The file with its owner's rights alone; SQLite gives its companions (-wal, -shm) the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise SetupError(
            f"the ledger {path} can't be written: {error.strerror}", hint="choose another --data-dir or database_url"
        ) from None


def _prepare_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # the driver would begin transactions by itself, and too late
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys=ON")
    # A record is acknowledged once it is committed, so a commit must outlive a power cut too.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """Take the write lock at the beginning: a reader that turns writer can fail with no wait at all."""
    writes = connection.get_execution_options().get("springtide_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", "springtide.ledger:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _first_line(error: BaseException) -> str:
    original = getattr(error, "orig", None) or error
    return (str(original).splitlines() or [type(original).__name__])[0]
