"""Many rows at once, on both kinds of database."""

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from helixflow.storage.bulk import add_to_rows, insert_rows
from helixflow.storage.engine import Database
from helixflow.storage.schema import journals, usage_daily

KEY = ("org", 86_400, "p", "k", "", "m")


async def test_rows_come_back_as_they_went_in(database: Database) -> None:
    rows = [(f"j{number:03d}", "Ärger\t\\N\n", number, 2**62, -1, None, number) for number in range(300)]
    async with database.writing() as connection:
        await insert_rows(connection, journals, rows)
        await insert_rows(connection, journals, [])
    assert [tuple(row) for row in await database.fetch_all(select(journals).order_by(journals.c.id))] == rows


async def test_a_row_that_is_there_breaks_the_rule_and_the_savepoint_saves_the_rest(database: Database) -> None:
    rows = [("j1", "n", 1, 0, 0, None, None), ("j2", "n", 1, 0, 0, None, None)]
    async with database.writing() as connection:
        await insert_rows(connection, journals, rows[:1])
        with pytest.raises(IntegrityError):
            async with connection.begin_nested():
                await insert_rows(connection, journals, rows[::-1])
        await insert_rows(connection, journals, rows[1:])
    assert len(await database.fetch_all(select(journals))) == 2


async def test_numbers_are_added_to_those_that_are_there(database: Database) -> None:
    async with database.writing() as connection:
        await add_to_rows(connection, usage_daily, [(*KEY, "d1", "o", 1, 0, 5, 0, 0, 0, 2**53)])
        await add_to_rows(
            connection,
            usage_daily,
            [(*KEY, "d1", "o", 2, 1, 0, 0, 0, 0, 2**53), (*KEY, "d2", "o", 1, 1, 1, 1, 1, 1, 1)],
        )
        await add_to_rows(connection, usage_daily, [])
    found = await database.fetch_all(select(usage_daily).order_by(usage_daily.c.deployment))
    assert [tuple(row) for row in found] == [
        (*KEY, "d1", "o", 3, 1, 5, 0, 0, 0, 2**54),
        (*KEY, "d2", "o", 1, 1, 1, 1, 1, 1, 1),
    ]


async def test_many_are_added_and_any_text_can_be_a_key(database: Database) -> None:
    """More than go into one statement, new ones and others."""
    key = ("org", 86_400, "p", 'k"\\\n', "Ä\U0001f600", "m")
    rows = [(*key, f"d{number:03d}", "o", 1, 0, number, 0, 0, 0, 2**61) for number in range(150)]
    async with database.writing() as connection:
        await add_to_rows(connection, usage_daily, rows[::2])
        await add_to_rows(connection, usage_daily, rows)
    found = await database.fetch_all(select(usage_daily).order_by(usage_daily.c.deployment))
    assert [tuple(row[:8]) for row in found] == [row[:8] for row in rows]
    assert [row.cost for row in found] == [2**62, 2**61] * 75
    assert [row.prompt_tokens for row in found] == [2 * number if number % 2 == 0 else number for number in range(150)]
