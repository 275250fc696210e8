"""Migrations, up and down, from empty and with data, on both kinds of database."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from helixflow.core.errors import ExitCode, UserError
from helixflow.settings.tree import Settings
from helixflow.storage.revisions import known_revisions
from helixflow.storage.schema import metadata
from helixflow.storage.upgrade import downgrade, upgrade

Sql = Callable[..., Awaitable[list[Any]]]
Look = Callable[[Callable[[Connection], Any]], Awaitable[Any]]

TABLES_OF_0001 = {"alembic_version", "organisations", "projects", "api_keys", "revocations"}
SCOPES = ["models:read", "models:use"]


def tables(connection: Connection) -> set[str]:
    """All but the partitions of the ledger, which PostgreSQL has beside it and the code does not expect by name."""
    return {name for name in inspect(connection).get_table_names() if not is_partition(name)}


def is_partition(name: str) -> bool:
    return name.startswith("requests_")


def shape(connection: Connection) -> dict[str, Any]:
    """What a database says about its tables, comparable."""
    inspector = inspect(connection)
    return {
        name: (
            sorted((c["name"], str(c["type"]), c["nullable"], c["default"]) for c in inspector.get_columns(name)),
            sorted((str(i["name"]), i["column_names"], i["unique"]) for i in inspector.get_indexes(name)),
            sorted((str(k["name"]), k["constrained_columns"]) for k in inspector.get_foreign_keys(name)),
            sorted((str(u["name"]), u["column_names"]) for u in inspector.get_unique_constraints(name)),
            inspector.get_pk_constraint(name)["name"],
        )
        for name in inspector.get_table_names()
        if name != "alembic_version"
    }


def fill_0001(connection: Connection) -> None:
    """An organisation with a project and keys: the first one, one in use, one revoked, one expired, one superseded."""
    run = connection.exec_driver_sql
    run("INSERT INTO organisations VALUES ('o1', 'Ärger & Söhne', 100)")
    run("INSERT INTO projects VALUES ('p1', 'o1', 'Default', 110)")
    statement = text(
        "INSERT INTO api_keys (id, hash, hint, name, organisation_id, project_id, created_at, expires_at, revoked_at,"
        " superseded, bootstrap)"
        " VALUES (:id, :hash, 'hfk_…', 'n', 'o1', 'p1', 120, :expires, :revoked, :superseded, :bootstrap)"
    )
    keys = [
        ("k0", None, None, True),
        ("k1", None, None, False),
        ("k2", None, 130, False),
        ("k3", 125, None, False),
        ("k4", None, 140, True),
    ]
    for number, (key_id, expires_at, revoked_at, bootstrap) in enumerate(keys):
        values = {"id": key_id, "hash": bytes([number]) * 32, "expires": expires_at, "revoked": revoked_at}
        connection.execute(statement, {**values, "superseded": key_id == "k4", "bootstrap": bootstrap})
    # The numbers of a key that came back and of two that did not.
    for key_id, revoked_at in (("k0", 125), ("k2", 130), ("k4", 140)):
        run(f"INSERT INTO revocations (key_id, revoked_at) VALUES ('{key_id}', {revoked_at})")


async def test_every_revision_goes_up_and_down_from_empty(database_settings: Settings, look: Look) -> None:
    shapes = {}
    for revision in reversed(known_revisions()):
        await upgrade(database_settings, revision)
        shapes[revision] = await look(shape)
    for revision in known_revisions():
        assert await look(shape) == shapes[revision], revision
        await downgrade(database_settings, "-1")
    assert await look(tables) == {"alembic_version"}
    await upgrade(database_settings)
    await upgrade(database_settings)
    assert await look(shape) == shapes[known_revisions()[0]]


async def test_the_migrations_lead_to_the_schema_that_the_code_expects(database_settings: Settings, look: Look) -> None:
    await upgrade(database_settings)

    def differences(connection: Connection) -> list[object]:
        options = {
            "compare_type": True,
            "compare_server_default": True,
            "include_name": lambda name, kind, _parents: kind != "table" or not is_partition(name),
        }
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))

    assert await look(differences) == []


async def test_what_0001_held_is_kept_with_sensible_values(database_settings: Settings, sql: Sql, look: Look) -> None:
    await upgrade(database_settings, "0001")
    await look(fill_0001)
    await upgrade(database_settings, "0002")
    organisations = (
        "SELECT id, name, audit_retention_days, created_at, updated_at, deleted_at, version FROM organisations"
    )
    assert await sql(organisations) == [("o1", "Ärger & Söhne", 0, 100, 100, None, 1)]
    projects = "SELECT id, organisation_id, name, created_at, updated_at, deleted_at, version FROM projects"
    assert await sql(projects) == [("p1", "o1", "Default", 110, 110, None, 1)]
    keys = await sql(
        "SELECT id, hash, hint, name, organisation_id, project_id, owner_id, created_by, rotated_from, created_at,"
        " updated_at, expires_at, revoked_at, CAST(superseded AS INTEGER), CAST(bootstrap AS INTEGER), version"
        " FROM api_keys ORDER BY id"
    )
    same = ("hfk_…", "n", "o1", "p1", "", "", None, 120, 120)
    assert keys == [
        ("k0", b"\0" * 32, *same, None, None, 0, 1, 1),
        ("k1", b"\1" * 32, *same, None, None, 0, 0, 1),
        ("k2", b"\2" * 32, *same, None, 130, 0, 0, 1),
        ("k3", b"\3" * 32, *same, 125, None, 0, 0, 1),
        ("k4", b"\4" * 32, *same, None, 140, 1, 1, 1),
    ]
    restrictions = await sql("SELECT CAST(scopes AS TEXT), CAST(models AS TEXT), CAST(networks AS TEXT) FROM api_keys")
    read = sorted([json.loads(value) for value in row] for row in restrictions)
    assert read == [[[], [], []]] * 2 + [[SCOPES, [], []]] * 3
    assert await sql("SELECT name, number, data FROM installation") == [("revision", 3, b"")]


async def test_keys_survive_the_way_down_and_up_again(database_settings: Settings, sql: Sql, look: Look) -> None:
    await upgrade(database_settings, "0001")
    await look(fill_0001)
    before = await sql("SELECT * FROM api_keys ORDER BY id")
    was = await look(shape)
    await upgrade(database_settings, "0002")
    await downgrade(database_settings, "0001")
    assert await look(shape) == was
    assert await look(tables) == TABLES_OF_0001
    assert sorted(await sql(f"SELECT {', '.join(KEY_COLUMNS)} FROM api_keys")) == before
    assert await sql("SELECT * FROM revocations ORDER BY revision") == [(2, "k2", 130), (3, "k4", 140)]
    await sql("INSERT INTO revocations (key_id, revoked_at) VALUES ('k1', 150)")
    assert await sql("SELECT revision FROM revocations WHERE key_id = 'k1'") == [(4,)]
    await upgrade(database_settings)
    assert await sql("SELECT number FROM installation WHERE name = 'revision'") == [(4,)]


KEY_COLUMNS = (
    "id",
    "hash",
    "hint",
    "name",
    "organisation_id",
    "project_id",
    "created_at",
    "expires_at",
    "revoked_at",
    "superseded",
    "bootstrap",
)


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        (
            [
                "UPDATE api_keys SET owner_id = 'acc_1' WHERE id = 'r1'",
                "UPDATE api_keys SET models = '[\"m\"]' WHERE id = 'r2'",
                "UPDATE api_keys SET networks = '[\"10.0.0.0/8\"]' WHERE id = 'r3'",
                "UPDATE api_keys SET scopes = '[\"models:read\"]' WHERE id = 'r4'",
            ],
            {"r1", "r2", "r3", "r4"},
        ),
        (["UPDATE organisations SET deleted_at = 150"], {"k0", "k1", "k3", "r1", "r2", "r3", "r4"}),
        (["UPDATE projects SET deleted_at = 150"], {"k0", "k1", "k3", "r1", "r2", "r3", "r4"}),
    ],
)
async def test_no_key_gains_power_on_the_way_down(
    database_settings: Settings, sql: Sql, look: Look, changes: list[str], gone: set[str]
) -> None:
    def fill(connection: Connection) -> None:
        fill_0001(connection)
        copied = ", ".join(column for column in KEY_COLUMNS if column not in ("id", "hash"))
        for number in range(1, 5):
            statement = f"INSERT INTO api_keys (id, hash, {copied}) SELECT 'r{number}', :hash, {copied} FROM api_keys"
            connection.execute(text(f"{statement} WHERE id = 'k1'"), {"hash": b"r%d" % number})

    def change(connection: Connection) -> None:
        for statement in changes:
            connection.exec_driver_sql(statement)

    await upgrade(database_settings, "0001")
    await look(fill)
    await upgrade(database_settings, "0002")
    await look(change)
    await downgrade(database_settings, "0001")
    revoked = {row[0] for row in await sql("SELECT id FROM api_keys WHERE revoked_at IS NOT NULL")}
    assert revoked == {"k2", "k4"} | gone
    assert {row[0] for row in await sql("SELECT key_id FROM revocations")} == revoked


async def test_rows_of_every_table_do_not_keep_it_from_going_down(
    database_settings: Settings, sql: Sql, look: Look
) -> None:
    await upgrade(database_settings)
    rows = {
        "organisations": {"id": "o"},
        "accounts": {"id": "a", "home_organisation_id": "o"},
        "projects": {"id": "p", "organisation_id": "o"},
        "api_keys": {"id": "k", "organisation_id": "o", "project_id": "p"},
        "roles": {"id": "r", "organisation_id": "o"},
        "memberships": {"account_id": "a", "organisation_id": "o"},
        "service_accounts": {"id": "s", "organisation_id": "o"},
        "sessions": {"id": "s", "account_id": "a", "organisation_id": "o"},
        "refresh_tokens": {"session_id": "s"},
        "recovery_codes": {"account_id": "a"},
        "one_time_tokens": {"id": "t", "organisation_id": "o"},
        "signing_keys": {"kid": "k"},
        "audit_checkpoints": {"kid": "k"},
    }

    def fill(connection: Connection) -> None:
        for table in metadata.sorted_tables:
            samples = {"TEXT": "", "BIGINT": 7, "INTEGER": 7, "BLOB": b"x", "JSON": [], "BOOLEAN": False}
            row = {column.name: samples[str(column.type)] for column in table.columns if not column.nullable}
            connection.execute(table.insert().values({**row, **rows.get(table.name, {})}))

    await look(fill)
    await downgrade(database_settings, "base")
    assert await look(tables) == {"alembic_version"}


async def test_a_schema_from_a_newer_version_is_refused_untouched(database_settings: Settings, sql: Sql) -> None:
    await upgrade(database_settings)
    await sql("UPDATE alembic_version SET version_num = '9999'")
    for attempt in (upgrade(database_settings), downgrade(database_settings, "base")):
        with pytest.raises(UserError, match=r"newer HelixFlow \(schema 9999\)") as caught:
            await attempt
        assert caught.value.exit_code is ExitCode.STORAGE
        assert "\n" not in caught.value.message
    assert await sql("SELECT version_num FROM alembic_version") == [("9999",)]
    assert await sql("SELECT name FROM installation") == [("revision",)]


async def test_a_migration_that_fails_half_way_leaves_nothing(
    database_settings: Settings, sql: Sql, look: Look
) -> None:
    await sql("CREATE TABLE revocations (x INTEGER)")
    with pytest.raises(Exception, match="already exists"):
        await upgrade(database_settings)
    assert await look(tables) == {"revocations"}


async def test_processes_that_upgrade_at_once_wait_for_each_other(database_settings: Settings, look: Look) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(upgrade(database_settings))
    assert await look(tables) == {*metadata.tables, "alembic_version"}
