"""Fixtures for tests of the auth service's operations: each runs on SQLite and on PostgreSQL."""

from collections.abc import AsyncIterator

import pytest

from helixflow.storage.engine import Database
from tests.harness.auth import Installation
from tests.harness.sessions import SignIns


@pytest.fixture
async def auth(database: Database) -> AsyncIterator[Installation]:
    """AdminService on an empty database."""
    installation = Installation(database)
    yield installation
    await installation.close()


@pytest.fixture
async def door(database: Database) -> AsyncIterator[SignIns]:
    """SessionService on an empty database, with a signing key."""
    door = await SignIns.open(database)
    yield door
    await door.close()
