import os
import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError

from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.storage.engine import create_engine, open_database
from helixflow.storage.schema import metadata
from helixflow.storage.upgrade import downgrade, upgrade


def tables(path: Path) -> set[str]:
    with sqlite3.connect(path) as connection:
        names = {row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")}
    connection.close()
    return names - {"sqlite_sequence"}


async def test_up_and_down_from_empty_and_up_again(tmp_path: Path) -> None:
    path = tmp_path / "odd %name#?.db"
    await upgrade(path)
    assert tables(path) == {"alembic_version", "organisations", "projects", "api_keys", "revocations"}
    await downgrade(path, "base")
    assert tables(path) == {"alembic_version"}
    await upgrade(path)
    await upgrade(path)
    assert "api_keys" in tables(path)


async def test_the_migrations_lead_to_the_schema_that_the_code_expects(tmp_path: Path) -> None:
    await upgrade(tmp_path / "x.db")
    engine = create_engine(tmp_path / "x.db")

    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    async with engine.connect() as connection:
        assert await connection.run_sync(differences) == []
    await engine.dispose()


async def test_a_schema_from_a_newer_version_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    await upgrade(path)
    with sqlite3.connect(path) as connection:
        connection.execute("update alembic_version set version_num = '9999'")
    connection.close()
    with pytest.raises(UserError, match=r"newer HelixFlow \(schema 9999\)") as caught:
        await upgrade(path)
    assert caught.value.exit_code is ExitCode.STORAGE
    assert "\n" not in caught.value.message


async def test_a_migration_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table revocations (x)")
    connection.close()
    with pytest.raises(Exception, match="already exists"):
        await upgrade(path)
    assert tables(path) == {"revocations"}


@pytest.mark.parametrize(
    "content", [b"not a database at all, but long enough" * 100, b"SQLite format 3\0" + b"\xff" * 4096]
)
async def test_a_spoilt_file_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.db: it is .*restore it from a backup") as caught:
        await upgrade(path)
    assert caught.value.exit_code is ExitCode.STORAGE
    assert path.read_bytes() == content


async def test_a_locked_database_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.db"
    await upgrade(path)
    monkeypatch.setattr(
        "helixflow.storage.upgrade.create_engine", lambda path: create_engine(path, busy_timeout_s=0.05)
    )
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("begin immediate")
    try:
        with pytest.raises(UserError, match="another process holds it locked"):
            await upgrade(path)
    finally:
        holder.close()


async def test_a_folder_where_nothing_can_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be used as data_dir") as caught:
        open_database(tmp_path / "file")
    assert caught.value.exit_code is ExitCode.STORAGE


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_read_only_file_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.touch(0o400)
    with pytest.raises(UserError, match="read-only"):
        await upgrade(path)


@pytest.mark.parametrize(
    ("pragma", "kind"), [("max_page_count = 1", ErrorKind.STORAGE_FULL), ("query_only = 1", ErrorKind.UNAVAILABLE)]
)
async def test_a_full_or_read_only_disk_is_an_error_with_a_kind(tmp_path: Path, pragma: str, kind: ErrorKind) -> None:
    database = open_database(tmp_path)
    await upgrade(database.path)
    with pytest.raises(HelixError) as caught:
        async with database.writing() as connection:
            await connection.execute(text(f"pragma {pragma}"))
            for number in range(200):
                row = {"id": f"{number}", "name": "x" * 4000}
                await connection.execute(text("insert into organisations values (:id, :name, 0)"), row)
    assert caught.value.kind is kind
    await database.close()


async def test_foreign_keys_are_enforced_and_a_failed_transaction_leaves_nothing(tmp_path: Path) -> None:
    database = open_database(tmp_path)
    await upgrade(database.path)
    with pytest.raises(IntegrityError):
        async with database.writing() as connection:
            await connection.execute(text("insert into organisations values ('o', 'n', 0)"))
            await connection.execute(text("insert into projects values ('p', 'missing', 'n', 0)"))
    async with database.reading() as connection:
        assert (await connection.execute(text("select count(*) from organisations"))).scalar() == 0
        assert (await connection.execute(text("pragma journal_mode"))).scalar() == "wal"
    await database.close()
