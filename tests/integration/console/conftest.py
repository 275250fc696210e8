"""The admin API on its socket, before an auth service that answers as told."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from helixflow.console.app import create_app
from helixflow.console.server import AdminServer
from tests.harness.scripted_auth import ScriptedAuth, scripted_auth

CREDENTIAL = {"authorization": "Bearer hfk_test"}


@pytest.fixture
async def auth(tmp_path: Path) -> AsyncIterator[ScriptedAuth]:
    async with scripted_auth(tmp_path / "auth.sock") as running:
        yield running


@pytest.fixture
async def admin_socket(tmp_path: Path, auth: ScriptedAuth) -> AsyncIterator[Path]:
    path = tmp_path / "admin.sock"
    server = AdminServer(create_app(auth.channel), path)
    await server.start()
    try:
        yield path
    finally:
        await server.close()


@pytest.fixture
async def api(admin_socket: Path) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.AsyncHTTPTransport(uds=str(admin_socket))
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://admin/api/v1", timeout=60, headers=CREDENTIAL
    ) as client:
        yield client
