"""PostgreSQL's own troubles: it goes away, comes back, is not there yet, refuses us, or is not who it should be."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import DBAPIError

from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.settings.tree import DatabaseSettings, Settings
from helixflow.storage.engine import Database, locate, open_database
from helixflow.storage.postgresql import PostgresqlServer
from helixflow.storage.schema import installation
from helixflow.storage.upgrade import upgrade
from tests.harness.postgres import ROLE, PostgresServer

NUMBER = select(installation.c.number).where(installation.c.name == "revision")


@pytest.fixture
def settings(postgres_server: PostgresServer, migrated_postgresql: str, tmp_path: Path) -> Iterator[Settings]:
    with postgres_server.database(template=migrated_postgresql) as url:
        yield Settings(data_dir=tmp_path, database=postgres_server.settings(url, tmp_path, pool_size=3))


@pytest.fixture
async def opened(settings: Settings) -> AsyncIterator[Database]:
    database = open_database(settings)
    yield database
    await database.close()


async def read(database: Database) -> int:
    async with database.reading() as connection:
        return int((await connection.execute(NUMBER)).scalar_one())


async def count_up(database: Database) -> int:
    async with database.writing() as connection:
        await connection.execute(update(installation).values(number=installation.c.number + 1))
        return int((await connection.execute(NUMBER)).scalar_one())


async def look_up(database: Database) -> int:
    row = await database.fetch_one(NUMBER)
    assert row is not None
    return int(row.number)


WAYS = [read, count_up, look_up]


async def unavailable(call: Callable[[], Awaitable[Any]]) -> HelixError:
    with pytest.raises(HelixError) as caught:
        await call()
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    return caught.value


async def eventually(call: Callable[[], Awaitable[Any]], within_s: float = 60.0) -> None:
    """Until the call is not UNAVAILABLE any more."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                await call()
            except HelixError as exc:
                assert exc.kind is ErrorKind.UNAVAILABLE
                await asyncio.sleep(0.01)
            else:
                return


async def test_calls_fail_fast_while_the_server_is_gone_and_work_again_by_themselves(
    postgres_server: PostgresServer, opened: Database
) -> None:
    assert await count_up(opened) == 1
    await asyncio.to_thread(postgres_server.kill)
    started = time.monotonic()
    for _ in range(20):
        for way in WAYS:
            error = await unavailable(lambda way=way: way(opened))  # type: ignore[misc]
            assert str(postgres_server.port) not in error.message
    assert time.monotonic() - started < 30
    await asyncio.to_thread(postgres_server.start)
    await eventually(lambda: look_up(opened))
    assert await count_up(opened) == 2
    assert await read(opened) == 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("end", [PostgresServer.kill, PostgresServer.stop])
async def test_connections_lost_while_idle_fail_no_call_once_the_server_is_back(
    postgres_server: PostgresServer,
    opened: Database,
    end: Callable[[PostgresServer], None],
    way: Callable[[Database], Awaitable[int]],
) -> None:
    # As many connections as the pool takes.
    await asyncio.gather(*(read(opened) for _ in range(3)))
    await asyncio.to_thread(end, postgres_server)
    await asyncio.to_thread(postgres_server.start)
    await asyncio.gather(*(way(opened) for _ in range(6)))


async def test_a_connection_lost_within_a_transaction_fails_that_one_only_and_stores_nothing(
    postgres_server: PostgresServer, opened: Database
) -> None:
    ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'helixflow'"

    async def write() -> None:
        async with opened.writing() as connection:
            await connection.execute(update(installation).values(number=7))
            await asyncio.to_thread(postgres_server.execute, ended)
            await connection.execute(update(installation).values(number=8))

    await unavailable(write)
    assert await read(opened) == 0
    assert await count_up(opened) == 1


async def test_a_start_waits_for_a_server_that_is_not_up_yet(
    postgres_server: PostgresServer, settings: Settings
) -> None:
    await asyncio.to_thread(postgres_server.stop)
    waiting = asyncio.create_task(upgrade(settings, wait_s=30))
    await asyncio.sleep(0)
    await asyncio.to_thread(postgres_server.start)
    await waiting
    await asyncio.to_thread(postgres_server.stop)
    with pytest.raises(UserError) as caught:
        await upgrade(settings, wait_s=0.3)
    assert caught.value.exit_code is ExitCode.STORAGE
    address = settings.database.url.partition("@")[2]
    reason = "nothing listens there; is PostgreSQL running, and are host and port right?"
    assert caught.value.message == f"postgresql://{address}: {reason}"


async def test_another_writer_that_does_not_end_is_an_error_within_bounds(settings: Settings, opened: Database) -> None:
    location = locate(settings)
    assert isinstance(location, PostgresqlServer)
    impatient = replace(location, lock_timeout_s=0.05)
    second = Database(impatient, impatient.create_engine())
    async with opened.writing():
        await unavailable(lambda: count_up(second))
        assert await read(second) == 0
    assert await count_up(second) == 1
    await second.close()


async def refusal(settings: Settings, **changes: Any) -> str:
    changed = settings.model_copy(update={"database": settings.database.model_copy(update=changes)})
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        await upgrade(changed, wait_s=120)
    assert time.monotonic() - started < 60, "it waited for what does not pass"
    assert "\n" not in caught.value.message
    return caught.value.message.partition(": ")[2]


async def test_refusals_are_one_clear_line(settings: Settings, postgres_server: PostgresServer, tmp_path: Path) -> None:
    url = settings.database.url
    (tmp_path / "wrong").write_text("not-the-password")
    for password_file in (tmp_path / "wrong", None):
        message = await refusal(settings, password_file=password_file)
        assert message.startswith("the password was refused")
        assert "not-the-password" not in message
    assert (await refusal(settings, url=url.replace(ROLE, "nobody"))).startswith("the password was refused")
    assert (await refusal(settings, url=f"{url}_missing")).startswith("there is no such database")
    assert (await refusal(settings, url=f"{url}?sslmode=require")).startswith("it offers no TLS")


async def test_a_database_where_we_may_make_nothing_is_one_clear_line(
    postgres_server: PostgresServer, tmp_path: Path
) -> None:
    with postgres_server.database() as url:
        name = url.rpartition("/")[2]
        postgres_server.execute(f"ALTER DATABASE {name} OWNER TO superuser")
        settings = Settings(data_dir=tmp_path, database=postgres_server.settings(url, tmp_path))
        assert "make it the owner of the database" in await refusal(settings)


async def test_another_encoding_is_refused(postgres_server: PostgresServer, tmp_path: Path) -> None:
    name = "latin"
    postgres_server.execute(f"CREATE DATABASE {name} OWNER {ROLE} TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
    settings = Settings(data_dir=tmp_path, database=postgres_server.settings(postgres_server.url(name), tmp_path))
    assert "ENCODING 'UTF8'" in await refusal(settings)
    postgres_server.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def test_too_many_connections_are_waited_for_and_named(
    postgres_server: PostgresServer, settings: Settings, opened: Database
) -> None:
    await look_up(opened)
    name = settings.database.url.rpartition("/")[2]
    postgres_server.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 1")
    with pytest.raises(UserError, match="too many connections"):
        await upgrade(settings, wait_s=0)
    async with opened.reading() as connection:
        await connection.execute(NUMBER)
        await unavailable(lambda: look_up(opened))
    assert await look_up(opened) == 0


async def test_the_session_depends_on_no_setting_of_user_or_database(
    postgres_server: PostgresServer, settings: Settings
) -> None:
    name = settings.database.url.rpartition("/")[2]
    for setting in (
        "search_path = nowhere",
        "timezone = 'Asia/Kathmandu'",
        "default_transaction_read_only = on",
        "default_transaction_isolation = serializable",
        "statement_timeout = '1ms'",
        "bytea_output = 'escape'",
        "standard_conforming_strings = off",
        "DateStyle = 'German'",
    ):
        postgres_server.execute(f"ALTER DATABASE {name} SET {setting}")
    await upgrade(settings)
    database = open_database(settings)
    async with database.writing() as connection:
        values = {"name": "back\\slash", "number": 1, "data": bytes(range(256))}
        await connection.execute(insert(installation).values(values))
        assert (await connection.execute(text("SHOW transaction_isolation"))).scalar() == "read committed"
    row = await database.fetch_one(select(installation).where(installation.c.name == "back\\slash"))
    assert row is not None
    assert row.data == bytes(range(256))
    async with database.reading() as connection:
        assert (await connection.execute(text("SHOW transaction_isolation"))).scalar() == "repeatable read"
        assert (await connection.execute(text("SHOW timezone"))).scalar() == "UTC"
    await database.close()


async def test_a_reader_cannot_write(opened: Database) -> None:
    async def write_while_reading() -> None:
        async with opened.reading() as connection:
            await connection.execute(update(installation).values(number=1))

    await unavailable(write_while_reading)
    assert await read(opened) == 0


async def test_a_look_up_is_one_statement_without_a_transaction(
    opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await look_up(opened)
    sent: list[str] = []

    async def begun(self: Any) -> None:
        sent.append("BEGIN")

    monkeypatch.setattr("asyncpg.transaction.Transaction.start", begun)
    assert await look_up(opened) == 0
    assert sent == []
    with pytest.raises((DBAPIError, asyncpg.InterfaceError)):
        await read(opened)
    assert sent == ["BEGIN"]


async def test_a_unix_socket_works_too(postgres_server: PostgresServer, settings: Settings) -> None:
    name = settings.database.url.rpartition("/")[2]
    url = f"postgresql://{ROLE}@/{name}?host={postgres_server.socket_folder}"
    port = postgres_server.port
    with_port = url.replace("@/", f"@:{port}/")
    database_settings = DatabaseSettings(url=with_port, password_file=settings.database.password_file)
    database = open_database(settings.model_copy(update={"database": database_settings}))
    assert await look_up(database) == 0
    await database.close()


async def test_a_connection_that_was_idle_for_long_is_asked_before_it_is_used(
    opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await look_up(opened)
    monkeypatch.setattr("helixflow.storage.postgresql._TRUSTED_IDLE_S", -1.0)
    asked: list[str] = []

    execute = asyncpg.Connection.execute

    async def forgotten(connection: Any, query: str, **options: Any) -> Any:
        """As where a firewall dropped the connection silently: no answer comes."""
        if query != "SELECT 1":
            return await execute(connection, query, **options)
        asked.append(query)
        raise TimeoutError

    monkeypatch.setattr("asyncpg.Connection.execute", forgotten)
    assert [await way(opened) for way in WAYS] == [0, 1, 1]
    assert len(asked) == 3
