"""The ledger as the rest of the platform sees it: one object over one database. Each call is one transaction."""

from __future__ import annotations

from collections.abc import Sequence

from springtide.core.cluster import KeyRecord, PrivacyClass, Tenant
from springtide.core.ids import new_api_key
from springtide.core.request import Usage
from springtide.ledger import keys, usage
from springtide.ledger.database import Database
from springtide.ledger.keys import DEFAULT_TENANT, ApiKey
from springtide.ledger.schema import api_keys, attempts, refused_usage, tenants
from springtide.ledger.schema import usage as usage_table
from springtide.ledger.usage import EVERYTHING, UsageFilter, UsageSummary


class Ledger:
    """Tenants, keys and usage. Any number of processes may have the same one open."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    async def open(cls, url: str) -> Ledger:
        """Open `sqlite:////path/ledger.db` or `postgresql://user:password@host/name`, made or brought up to date.

        Raises:
            SetupError: it can't be; says why and what to do.
        """
        return cls(await Database.open(url))

    async def close(self) -> None:
        await self._database.close()

    async def put_tenant(
        self, name: str, *, weight: float | None = None, privacy: PrivacyClass | None = None
    ) -> Tenant:
        """The tenant of that name, made or changed. What is None stays as it is (new: 1.0 and "trusted").

        Raises:
            InvalidRequest: a weight not above 0, an empty or overlong name.
        """
        async with self._database.write(tenants) as connection:
            return await keys.put_tenant(connection, name, weight=weight, privacy=privacy)

    async def tenants(self) -> list[Tenant]:
        """All tenants by name."""
        async with self._database.read() as connection:
            return await keys.list_tenants(connection)

    async def create_key(self, name: str, tenant: str = DEFAULT_TENANT) -> tuple[KeyRecord, str]:
        """A new key of a tenant (id or name), and the key itself: shown here, once, and nowhere kept.

        Raises:
            NotFound: no such tenant.
            InvalidRequest: an empty or overlong name.
        """
        plain = new_api_key()
        return await self.add_key(plain, name, tenant), plain

    async def add_key(self, plain: str, name: str, tenant: str = DEFAULT_TENANT) -> KeyRecord:
        """Register a key that exists already. Doing so again changes nothing, and does not un-revoke it."""
        async with self._database.write(tenants, api_keys) as connection:
            owner = await keys.find_tenant(connection, tenant)
            return await keys.add_key(connection, plain, name, owner)

    async def key(self, id: str) -> ApiKey:
        """Raises NotFound."""
        async with self._database.read() as connection:
            return await keys.get_key(connection, id)

    async def list_keys(self, limit: int = keys.MAX_ROWS) -> list[ApiKey]:
        """The newest `limit` keys, revoked ones too. Raises InvalidRequest: a limit out of [1, 10000]."""
        async with self._database.read() as connection:
            return await keys.list_keys(connection, limit)

    async def revoke_key(self, id: str) -> KeyRecord:
        """End a key for good. Raises NotFound."""
        async with self._database.write(api_keys) as connection:
            return await keys.revoke_key(connection, id)

    async def key_records(self) -> list[KeyRecord]:
        """Every key as gateways know it, revoked ones too."""
        async with self._database.read() as connection:
            return await keys.key_records(connection)

    async def keys_stamp(self) -> tuple[object, ...]:
        """Differs from an earlier one if any key or tenant has changed in between. Cheap."""
        async with self._database.read() as connection:
            return await keys.keys_stamp(connection)

    async def record_usage(self, records: Sequence[Usage]) -> int:
        """Write down what is new, all or nothing, and say how many that were. Safe to repeat: each request
        counts once however often it is delivered. On return it is on the disk."""
        if not records:
            return 0
        async with self._database.write(usage_table, attempts, refused_usage) as connection:
            return await usage.record_usage(connection, records)

    async def usage_summary(
        self, by: Sequence[str] = (), wanted: UsageFilter = EVERYTHING, *, limit: int = 1000
    ) -> list[UsageSummary]:
        """Sums over the wanted requests, grouped by any of tenant, key, model, day (UTC); at most `limit` rows.

        Raises:
            InvalidRequest: an unknown dimension, a limit out of [1, 10000].
        """
        async with self._database.read() as connection:
            return await usage.summarise(connection, by, wanted, limit)

    async def list_usage(
        self, wanted: UsageFilter = EVERYTHING, *, limit: int = 100, before: str | None = None
    ) -> list[Usage]:
        """The wanted requests one by one with their attempts, newest first, at most `limit`; `before` (the last
        id of the page before) goes on from there.

        Raises:
            NotFound: no such `before`.
            InvalidRequest: a limit out of [1, 10000].
        """
        async with self._database.read() as connection:
            return await usage.list_usage(connection, wanted, limit, before)

    async def usage(self, request_id: str) -> Usage:
        """One request's record. Raises NotFound."""
        async with self._database.read() as connection:
            return await usage.get_usage(connection, request_id)
