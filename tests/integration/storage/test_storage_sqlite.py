"""SQLite's own troubles: files that are spoilt, locked, read-only or full."""

import asyncio
import os
import sqlite3
import threading
from pathlib import Path

import pytest
from sqlalchemy import text

from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.settings.tree import Settings
from helixflow.storage.engine import Database, open_database
from helixflow.storage.sqlite import FILE_NAME, SqliteFile
from helixflow.storage.upgrade import upgrade


async def open_upgraded(data_dir: Path) -> Database:
    settings = Settings(data_dir=data_dir)
    await upgrade(settings)
    return open_database(settings)


async def test_folder_and_files_are_ours_alone_and_written_ahead(tmp_path: Path) -> None:
    database = await open_upgraded(tmp_path / "odd %name#?" / "data")
    async with database.writing() as connection:
        await connection.execute(text("UPDATE installation SET number = 1"))
        assert (await connection.execute(text("PRAGMA journal_mode"))).scalar() == "wal"
        assert (await connection.execute(text("PRAGMA synchronous"))).scalar() == 2
    files = list((tmp_path / "odd %name#?" / "data").iterdir())
    assert {file.name for file in files} >= {FILE_NAME, f"{FILE_NAME}-wal"}
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert files[0].parent.stat().st_mode & 0o777 == 0o700
    assert database.name == str(files[0].parent / FILE_NAME)
    await database.close()


@pytest.mark.parametrize(
    "content", [b"not a database at all, but long enough" * 100, b"SQLite format 3\0" + b"\xff" * 4096]
)
async def test_a_spoilt_file_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"helixflow\.db: it is .*restore it from a backup") as caught:
        await upgrade(Settings(data_dir=tmp_path))
    assert caught.value.exit_code is ExitCode.STORAGE
    assert path.read_bytes() == content


async def test_a_locked_database_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await upgrade(Settings(data_dir=tmp_path))
    monkeypatch.setattr("helixflow.storage.sqlite.MIGRATION_LOCK_TIMEOUT_S", 0.05)
    holder = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    holder.execute("begin immediate")
    location = SqliteFile(tmp_path / FILE_NAME, lock_timeout_s=0.05)
    database = Database(location, location.create_engine())
    try:
        with pytest.raises(UserError, match="another process holds it locked"):
            await upgrade(Settings(data_dir=tmp_path))
        with pytest.raises(HelixError) as caught:
            async with database.writing():
                raise AssertionError
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        assert await database.fetch_one(text("SELECT 1")) == (1,)
    finally:
        holder.close()
        await database.close()


async def test_opening_waits_for_another_process_that_makes_the_file(tmp_path: Path) -> None:
    maker = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None, check_same_thread=False)
    maker.execute("CREATE TABLE t (x)")
    maker.execute("BEGIN IMMEDIATE")
    ended = threading.Event()

    def end() -> None:
        ended.set()
        maker.rollback()

    later = threading.Timer(0.2, end)
    later.start()
    database = await asyncio.to_thread(open_database, Settings(data_dir=tmp_path))
    assert ended.is_set(), "it waited"
    later.join()
    maker.close()
    async with database.reading() as connection:
        assert (await connection.execute(text("PRAGMA journal_mode"))).scalar() == "wal"
    await database.close()


async def test_a_folder_where_nothing_can_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be used as data_dir") as caught:
        open_database(Settings(data_dir=tmp_path / "file"))
    assert caught.value.exit_code is ExitCode.STORAGE


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_read_only_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).touch(0o400)
    with pytest.raises(UserError, match="read-only"):
        await upgrade(Settings(data_dir=tmp_path))


@pytest.mark.parametrize(
    ("pragma", "kind"), [("max_page_count = 1", ErrorKind.STORAGE_FULL), ("query_only = 1", ErrorKind.UNAVAILABLE)]
)
async def test_a_full_or_read_only_disk_is_an_error_with_a_kind(tmp_path: Path, pragma: str, kind: ErrorKind) -> None:
    database = await open_upgraded(tmp_path)
    with pytest.raises(HelixError) as caught:
        async with database.writing() as connection:
            await connection.execute(text(f"PRAGMA {pragma}"))
            statement = text("INSERT INTO installation (name, number, data) VALUES (:name, 0, :data)")
            for number in range(200):
                await connection.execute(statement, {"name": f"{number}", "data": b"x" * 4000})
    assert caught.value.kind is kind
    await database.close()


async def test_rows_without_their_parents_stop_a_migration(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    await upgrade(settings, "0001")
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("INSERT INTO projects VALUES ('p', 'missing', 'n', 1)")
    connection.close()
    with pytest.raises(UserError, match="a row of projects refers to one that is missing"):
        await upgrade(settings)
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
    connection.close()
