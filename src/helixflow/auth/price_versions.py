"""Every price that anybody was ever told, by its version: what a row of the ledger names can be looked up for ever."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from sqlalchemy import Row, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.lookups import Lookups
from helixflow.metering.prices import Price, decode_price, encode_price
from helixflow.storage.engine import Database
from helixflow.storage.schema import price_versions

# Of one SELECT.
_BATCH: Final = 500


class PriceVersions:
    """Remembers prices. Raises `HelixError`s of `storage`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lookups = Lookups(database)

    async def keep(self, prices: Iterable[Price], now: int) -> None:
        """Stores those that are not stored yet; writes only then. `now` is seconds since the epoch."""
        wanted = {price.version: price for price in prices}
        if not (missing := await self._missing(wanted)):
            return
        async with self._database.writing() as connection:
            for version in missing:
                await keep_version(connection, wanted[version], now)

    async def find(self, versions: Iterable[str]) -> dict[str, Price]:
        """The prices of those versions; what is not there was never given to anybody."""
        found = await self.rows(versions)
        return {version: decode_price(row.body) for version, row in found.items()}

    async def rows(self, versions: Iterable[str]) -> dict[str, Row[Any]]:
        """The same as rows of the table."""
        asked = sorted(set(versions))
        rows: list[Row[Any]] = []
        for start in range(0, len(asked), _BATCH):
            part = asked[start : start + _BATCH]
            rows += await self._lookups.execute(select(price_versions).where(price_versions.c.version.in_(part)))
        return {row.version: row for row in rows}

    async def _missing(self, wanted: Mapping[str, Price]) -> list[str]:
        known = await self.rows(wanted)
        return [version for version in wanted if version not in known]


async def keep_version(connection: AsyncConnection, price: Price, now: int) -> None:
    """Stores one price within a writing transaction, unless it is stored already."""
    same = select(price_versions.c.version).where(price_versions.c.version == price.version)
    if (await connection.execute(same)).first() is None:
        values = {"version": price.version, "body": encode_price(price), "created_at": now}
        await connection.execute(insert(price_versions).values(values))
