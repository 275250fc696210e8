"""What `Database` promises, the same on SQLite and PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.organisations import NEW_ORGANISATION
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.settings.tree import Settings
from helixflow.storage.engine import Database, open_database
from helixflow.storage.schema import api_keys, changes, installation, organisations, projects

ORGANISATION = {**NEW_ORGANISATION, "name": "n", "created_at": 1, "updated_at": 1, "version": 1}
NUMBER = select(installation.c.number).where(installation.c.name == "revision")


@pytest.fixture
async def other(database_settings: Settings, database: Database) -> AsyncIterator[Database]:
    """The same database, as another control process has it open."""
    other = open_database(database_settings)
    yield other
    await other.close()


async def add_organisation(connection: AsyncConnection, organisation_id: str, **values: Any) -> None:
    await connection.execute(insert(organisations).values({**ORGANISATION, "id": organisation_id, **values}))


async def count(connection: AsyncConnection) -> int:
    return int((await connection.execute(select(func.count()).select_from(organisations))).scalar_one())


async def test_what_is_written_is_read_by_others(database: Database, other: Database) -> None:
    async with database.writing() as connection:
        await add_organisation(connection, "o")
    async with other.reading() as connection:
        assert await count(connection) == 1
    row = await other.fetch_one(select(organisations).where(organisations.c.id == "o"))
    assert row is not None
    assert (row.name, row.deleted_at) == ("n", None)
    assert await other.fetch_one(select(organisations).where(organisations.c.id == "p")) is None
    assert len(await other.fetch_all(select(organisations))) == 1


async def test_a_transaction_that_fails_leaves_nothing(database: Database) -> None:
    with pytest.raises(ZeroDivisionError):
        async with database.writing() as connection:
            await add_organisation(connection, "o")
            raise ZeroDivisionError
    with pytest.raises(IntegrityError):
        async with database.writing() as connection:
            await add_organisation(connection, "o")
            missing = {"id": "p", "organisation_id": "missing", "name": "n"}
            await connection.execute(insert(projects).values(**missing, created_at=1, updated_at=1, version=1))
    with pytest.raises(IntegrityError):
        async with database.writing() as connection:
            await add_organisation(connection, "o")
            await add_organisation(connection, "o")
    async with database.reading() as connection:
        assert await count(connection) == 0


async def test_a_cancelled_transaction_leaves_nothing_and_lets_the_next_one_in(database: Database) -> None:
    inside = asyncio.Event()

    async def write() -> None:
        async with database.writing() as connection:
            await add_organisation(connection, "o")
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(write())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with database.writing() as connection:
        assert await count(connection) == 0


async def test_a_reader_sees_one_state_while_another_process_writes(database: Database, other: Database) -> None:
    async with database.reading() as reader:
        assert await count(reader) == 0
        async with other.writing() as writer:
            await add_organisation(writer, "o")
        assert await count(reader) == 0
    async with database.reading() as reader:
        assert await count(reader) == 1


async def test_a_writer_sees_what_was_written_while_it_waited(database: Database, other: Database) -> None:
    async def seen_by_the_second() -> int:
        async with other.writing() as connection:
            return await count(connection)

    async with database.writing() as connection:
        waiting = asyncio.create_task(seen_by_the_second())
        # Anything at all that lets the other one run.
        for number in range(5):
            await add_organisation(connection, f"o{number}")
        assert not waiting.done()
    assert await waiting == 5


async def test_two_processes_that_write_at_once_number_without_gaps(database: Database, other: Database) -> None:
    async def append(to: Database) -> None:
        async with to.writing() as connection:
            number = (await connection.execute(NUMBER)).scalar_one() + 1
            row = {"kind": 1, "subject_id": "s", "organisation_id": "o", "at": 1}
            await connection.execute(insert(changes).values(revision=number, **row))
            await connection.execute(update(installation).values(number=number))

    async with asyncio.TaskGroup() as group:
        for number in range(60):
            group.create_task(append(database if number % 2 else other))
    rows = await database.fetch_all(select(changes.c.revision).order_by(changes.c.revision))
    assert [row.revision for row in rows] == list(range(1, 61))


async def test_many_readers_do_not_wait_for_a_writer_nor_keep_it_waiting(database: Database) -> None:
    async def read() -> int:
        async with database.reading() as connection:
            return await count(connection)

    async with database.writing() as writer:
        await add_organisation(writer, "o")
        assert await asyncio.gather(*(read() for _ in range(50))) == [0] * 50
    async with AsyncExitStack() as stack:
        readers = [await stack.enter_async_context(database.reading()) for _ in range(3)]
        assert [await count(reader) for reader in readers] == [1, 1, 1]
        async with database.writing() as writer:
            await add_organisation(writer, "p")


async def test_a_writer_that_keeps_others_waiting_is_an_error_within_bounds(
    database: Database, other: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helixflow.storage.engine.LOCK_TIMEOUT_S", 0.05)
    async with database.writing():
        with pytest.raises(HelixError) as caught:
            async with database.writing():
                raise AssertionError
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    async with database.writing() as connection:
        await add_organisation(connection, "o")


TEXTS = ["'; DROP TABLE organisations; --", "%s %(a)s :a $1 ? \\", "Ω≈ç√ Ωmega аdmin", "𝕳\u200b\u202e😀", "\r\n\t", ""]


@pytest.mark.parametrize("name", TEXTS)
async def test_text_comes_back_exactly_as_given(database: Database, name: str) -> None:
    async with database.writing() as connection:
        await add_organisation(connection, "o", name=name)
        await connection.execute(
            insert(projects).values(id="p", organisation_id="o", name=name, created_at=1, updated_at=1, version=1)
        )
        await connection.execute(
            insert(api_keys).values(
                id="k",
                hash=bytes(range(32)),
                hint=name,
                name=name,
                organisation_id="o",
                project_id="p",
                owner_id="",
                scopes=[name],
                models=[],
                networks=[name, name],
                priority=-1,
                weight=1,
                created_by=name,
                created_at=2**62,
                updated_at=1,
                superseded=False,
                bootstrap=True,
                version=1,
            )
        )
    row = await database.fetch_one(select(api_keys).where(api_keys.c.name == name, api_keys.c.bootstrap))
    assert row is not None
    assert (row.name, row.hash, row.scopes, row.models, row.networks) == (
        name,
        bytes(range(32)),
        [name],
        [],
        [name] * 2,
    )
    assert (row.created_at, row.superseded, row.bootstrap, row.expires_at) == (2**62, False, True, None)


async def test_values_stay_out_of_the_text_of_errors(database: Database) -> None:
    with pytest.raises(IntegrityError) as caught:
        async with database.writing() as connection:
            for _ in range(2):
                await add_organisation(connection, "o", name="a-secret-name")
    assert "a-secret-name" not in str(caught.value)


async def test_closing_twice_is_fine(database: Database) -> None:
    await database.fetch_one(NUMBER)
    await database.close()
    await database.close()
