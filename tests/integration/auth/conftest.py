"""Fixtures for tests of the auth service's operations: each runs on SQLite and on PostgreSQL."""

from collections.abc import AsyncIterator

import pytest

from helixflow.storage.engine import Database
from tests.harness.auth import Installation


@pytest.fixture
async def auth(database: Database) -> AsyncIterator[Installation]:
    """AdminService on an empty database."""
    installation = Installation(database)
    yield installation
    await installation.close()
