"""Checkpoints are made in time, once, by whichever process is first."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import select

from helixflow.auth.audit.checkpoints import EVERY_RECORDS, EVERY_S, Checkpoints
from helixflow.auth.sealing import Sealer
from helixflow.core.errors import HelixError
from helixflow.settings.tree import Settings
from helixflow.storage.engine import Database, open_database
from helixflow.storage.schema import audit_checkpoints, signing_keys
from tests.harness.audit import ORGANISATION, AuditLog


async def signed(database: Database, organisation_id: str = ORGANISATION) -> list[int]:
    query = select(audit_checkpoints.c.sequence).where(audit_checkpoints.c.organisation_id == organisation_id)
    return [row.sequence for row in await database.fetch_all(query.order_by(audit_checkpoints.c.sequence))]


async def keys(database: Database) -> list[Any]:
    return list(await database.fetch_all(select(signing_keys)))


async def test_a_chain_that_grew_is_signed_after_a_while(database: Database) -> None:
    log = AuditLog(database)
    await log.add("1", "2")
    assert await log.checkpoints.sign_due(log.now) == 1
    await log.add("3")
    log.clock.advance(EVERY_S - 1)
    assert await log.checkpoints.sign_due(log.now) == 0
    log.clock.advance(1)
    assert await log.checkpoints.sign_due(log.now) == 1
    log.clock.advance(EVERY_S)
    assert await log.checkpoints.sign_due(log.now) == 0
    assert await signed(database) == [2, 3]


async def test_a_chain_that_grows_fast_is_signed_sooner(database: Database) -> None:
    log = AuditLog(database)
    await log.add("1")
    await log.checkpoints.sign_due(log.now)
    await log.add(*map(str, range(EVERY_RECORDS - 1)))
    assert await log.checkpoints.sign_due(log.now) == 0
    await log.add("one more")
    assert await log.checkpoints.sign_due(log.now) == 1
    assert await signed(database) == [1, EVERY_RECORDS + 1]


async def test_all_chains_are_signed_however_many(database: Database) -> None:
    log = AuditLog(database)
    for number in range(103):
        await log.add("1", organisation_id=f"org_{number}")
    assert await log.checkpoints.sign_due(log.now) == 103
    assert await signed(database, "org_102") == [1]


async def test_two_processes_sign_once_and_with_one_key(database: Database, database_settings: Settings) -> None:
    log = AuditLog(database)
    for number in range(5):
        await log.add("1", organisation_id=f"org_{number}")
    other = open_database(database_settings)
    try:
        counts = await asyncio.gather(
            *(AuditLog(one).checkpoints.sign_due(log.now) for one in (database, other, database, other))
        )
    finally:
        await other.close()
    assert sum(counts) == 5
    assert len(await keys(database)) == 1


async def test_the_private_key_is_sealed_and_opens_with_the_master_key_only(database: Database) -> None:
    log = AuditLog(database)
    await log.add("1")
    await log.checkpoints.sign_due(log.now)
    (row,) = await keys(database)
    assert row.purpose == "audit"
    assert row.expires_at is None
    # PKCS #8 begins with this sequence.
    assert b"\x2a\x86\x48\xce\x3d\x03\x01\x07" in row.public_key
    assert b"\x2a\x86\x48\xce\x3d\x03\x01\x07" not in row.private_key
    log.clock.advance(EVERY_S)
    await log.add("2")
    with pytest.raises(HelixError, match="cannot be opened"):
        await Checkpoints(database, Sealer(bytes(32))).sign_due(log.now)
    assert await log.checkpoints.sign_due(log.now) == 1
