"""The ledger's tables, in types that SQLite and PostgreSQL both have. Knows how they look, not who writes them.

The tables as they came to be stand in `migrations/`; a test holds the two together.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ColumnElement,
    Date,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    MetaData,
    Table,
    Text,
    TypeDecorator,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

# Every constraint has a name, so that a later migration can alter it on either database.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(TypeDecorator[datetime]):
    """A moment, with its zone: in and out it is aware and UTC. SQLite keeps it as text that sorts by time."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a time without a zone: {value!r}")
        return value.astimezone(UTC)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        moment: datetime = value
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


class utc_day(FunctionElement[Any]):
    """The UTC calendar day of a UtcDateTime column."""

    type = Date()
    inherit_cache = True
    name = "utc_day"

    def __init__(self, moment: ColumnElement[Any]) -> None:
        super().__init__(moment)


@compiles(utc_day, "sqlite")
def _utc_day_sqlite(element: utc_day, compiler: SQLCompiler, **options: Any) -> str:
    return f"date({compiler.process(element.clauses, **options)})"


@compiles(utc_day, "postgresql")
def _utc_day_postgresql(element: utc_day, compiler: SQLCompiler, **options: Any) -> str:
    return f"CAST(timezone('UTC', {compiler.process(element.clauses, **options)}) AS DATE)"


tenants = Table(
    "tenants",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("weight", Double, nullable=False),
    Column("privacy", Text, nullable=False),
    Column("created", UtcDateTime, nullable=False),
    Column("changed", UtcDateTime, nullable=False),
    CheckConstraint("weight > 0", name="weight_positive"),
    CheckConstraint("privacy IN ('trusted', 'any')", name="privacy_known"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant_id", Text, ForeignKey("tenants.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("hash", Text, nullable=False, unique=True),  # SHA-256 of the key, hex
    Column("hint", Text, nullable=False),  # its first and last characters, for its owner to know it by
    Column("created", UtcDateTime, nullable=False),
    Column("revoked", UtcDateTime),
    Index(None, "tenant_id"),
)

# tenant_id and key_id are no foreign keys: what was used must be written down even where the tenant is not
# known to this database (one restored from a backup, say); a refused insert would hold up all that follow.
usage = Table(
    "usage",
    metadata,
    Column("request_id", Text, primary_key=True),  # exactly one record a request
    Column("tenant_id", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("gateway", Text, nullable=False),
    Column("created", UtcDateTime, nullable=False),
    Column("finished", UtcDateTime, nullable=False),
    Column("first_token_s", Double),  # seconds from `created`; NULL: no token came
    Column("outcome", Text, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("recorded", UtcDateTime, nullable=False),
    Index(None, "tenant_id", "created"),
    Index(None, "created"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("request_id", Text, ForeignKey("usage.request_id", ondelete="CASCADE"), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("node", Text, nullable=False),
    Column("replica", Text, nullable=False),
    Column("started", UtcDateTime, nullable=False),
    Column("ended", UtcDateTime, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Index(None, "node", "started"),
)

# Records that the ledger can't take: kept whole for a person to look at, and out of the way of the others.
refused_usage = Table(
    "refused_usage",
    metadata,
    Column("hash", Text, primary_key=True),  # SHA-256 of `record`, hex: the same one is refused once
    Column("received", UtcDateTime, nullable=False),
    Column("reason", Text, nullable=False),
    Column("record", Text, nullable=False),  # JSON
)
