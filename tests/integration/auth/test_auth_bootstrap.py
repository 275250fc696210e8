import asyncio
import secrets
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from helixflow.auth.authentication import find_key, held_by_key
from helixflow.auth.service import AuthServices, create_auth
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ExitCode, UserError
from helixflow.core.keys import generate_key, hash_key
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_KEY
from helixflow.settings.tree import AuthSettings, Settings
from helixflow.storage.schema import api_keys, audit_records, changes
from tests.harness.postgres import PostgresServer


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data")


@asynccontextmanager
async def started(
    settings: Settings, from_env: str | None = None, clock: FakeClock | None = None
) -> AsyncIterator[AuthServices]:
    services = await create_auth(settings, from_env, clock)
    try:
        yield services
    finally:
        await services.close()


async def works(services: AuthServices, key: str) -> bool:
    async with services.units._database.reading() as connection:
        row = await find_key(connection, hash_key(key))
        return row is not None and await held_by_key(connection, row, 1_700_000_000) is not None


async def revoke_by_hand(services: AuthServices, key: str) -> None:
    async with services.units._database.writing() as connection:
        values = {"revoked_at": 1, "superseded": False}
        await connection.execute(api_keys.update().where(api_keys.c.hash == hash_key(key)).values(values))


async def test_it_is_made_once_kept_private_and_valid(database_settings: Settings) -> None:
    async with started(database_settings) as services:
        first = services.bootstrap_key
        assert await works(services, first)
    path = database_settings.data_dir / "bootstrap.key"
    assert path.read_text().strip() == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    async with started(database_settings) as services:
        assert services.bootstrap_key == first
        assert await works(services, first)
        records = await services.units._database.fetch_all(audit_records.select())
    # Made once, recorded once; so is what the configuration says at the first start.
    acts = {("system", "apply_configuration_file"), ("system", "install_bootstrap_key")}
    assert {(record.actor_kind, record.action) for record in records} == acts
    assert len(records) == len(acts)
    assert [file.name for file in database_settings.data_dir.iterdir() if file.name.startswith(".")] == []


async def test_starts_at_the_same_time_end_with_one_key(database_settings: Settings) -> None:
    services = await asyncio.gather(*(create_auth(database_settings, None) for _ in range(4)))
    assert len({one.bootstrap_key for one in services}) == 1
    for one in services:
        await one.close()


async def test_a_changed_key_from_the_environment_replaces_the_one_before(settings: Settings) -> None:
    a, b = generate_key(), generate_key()
    for key, other in ((a, b), (b, a), (a, b)):
        async with started(settings, key) as services:
            assert services.bootstrap_key == key
            assert await works(services, key)
            assert not await works(services, other)
            told = await services.units._database.fetch_all(changes.select())
    # Of each that gave way or came back; nobody can know of a new one.
    assert [(row.kind, row.key_hash) for row in told] == [(CHANGE_KIND_KEY, hash_key(key)) for key in (a, b, a)]
    assert not (settings.data_dir / "bootstrap.key").exists()


async def test_one_that_was_revoked_by_hand_stays_dead(settings: Settings) -> None:
    async with started(settings) as services:
        first = services.bootstrap_key
        await revoke_by_hand(services, first)
    async with started(settings) as services:
        assert services.bootstrap_key != first
        assert not await works(services, first)
    with pytest.raises(UserError, match="was revoked") as caught:
        await create_auth(settings, first)
    assert caught.value.exit_code is ExitCode.CONFIG


async def test_a_malformed_one_stops_the_start_and_is_not_repeated(settings: Settings) -> None:
    bad = generate_key()[:-1] + "!"
    with pytest.raises(UserError, match="HELIXFLOW_BOOTSTRAP_API_KEY") as caught:
        await create_auth(settings, bad)
    assert caught.value.exit_code is ExitCode.CONFIG
    assert bad not in caught.value.message
    (settings.data_dir / "bootstrap.key").write_text(bad)
    with pytest.raises(UserError, match=r"bootstrap\.key") as caught:
        await create_auth(settings, None)
    assert bad not in caught.value.message


async def test_a_database_or_master_key_that_cannot_be_used_stops_the_start_in_one_line(settings: Settings) -> None:
    async with started(settings):
        pass
    (settings.data_dir / "master.key").unlink()
    (settings.data_dir / "master.key").write_text("0" * 64)
    (settings.data_dir / "master.key").chmod(0o600)
    with pytest.raises(UserError, match="not the master key of this database") as caught:
        await create_auth(settings, None)
    assert caught.value.exit_code is ExitCode.CONFIG
    (settings.data_dir / "helixflow.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(UserError, match="not a SQLite database") as caught:
        await create_auth(settings, None)
    assert caught.value.exit_code is ExitCode.STORAGE


async def test_nodes_on_one_database_keep_a_key_each(
    postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARED_MASTER_KEY", secrets.token_hex(32))
    with postgres_server.database() as url:
        auth = AuthSettings(master_key_env="SHARED_MASTER_KEY")
        database = postgres_server.settings(url, tmp_path)
        here, there = (Settings(data_dir=tmp_path / name, auth=auth, database=database) for name in ("a", "b"))
        for node in (here, there):
            node.data_dir.mkdir()
        async with started(here) as a, started(there) as b:
            lost, other = a.bootstrap_key, b.bootstrap_key
            assert lost != other
            assert [await works(b, key) for key in (lost, other)] == [True, True]
        here.bootstrap_key_file.unlink()
        async with started(here) as a:
            made = a.bootstrap_key
            assert [await works(a, key) for key in (lost, other, made)] == [False, True, True]
        async with started(here, generate_key()) as a:
            assert [await works(a, key) for key in (other, made, a.bootstrap_key)] == [False, False, True]
