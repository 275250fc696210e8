"""`find_standing` and `find_problems`, and `helixflow db` over them, on both kinds of database."""

import json
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from helixflow.cli.main import main
from helixflow.core.errors import UserError
from helixflow.settings.tree import Settings
from helixflow.storage.inspection import find_problems, find_standing
from helixflow.storage.revisions import known_revisions
from helixflow.storage.sqlite import FILE_NAME
from helixflow.storage.upgrade import upgrade

Sql = Callable[..., Awaitable[list[Any]]]
Run = Callable[..., tuple[int, str, str]]
NEWEST = known_revisions()[0]


async def test_a_database_stands_where_its_migrations_left_it(database_settings: Settings, sql: Sql) -> None:
    assert (await find_standing(database_settings)).state == "empty"
    await upgrade(database_settings, "0001")
    standing = await find_standing(database_settings)
    assert (standing.state, standing.revision, standing.newest) == ("older", "0001", NEWEST)
    await upgrade(database_settings)
    assert (await find_standing(database_settings)).state == "current"
    await sql("UPDATE alembic_version SET version_num = '9999'")
    standing = await find_standing(database_settings)
    assert (standing.state, standing.revision) == ("newer", "9999")


async def test_looking_makes_no_file(tmp_path: Path) -> None:
    assert (await find_standing(Settings(data_dir=tmp_path / "data"))).state == "empty"
    assert list(tmp_path.iterdir()) == []


async def test_what_was_changed_by_hand_is_found(database_settings: Settings, sql: Sql) -> None:
    await upgrade(database_settings)
    assert await find_problems(database_settings) == []
    await sql("CREATE TABLE of_somebody_else (x INTEGER)")
    assert await find_problems(database_settings) == []
    await sql("DROP TABLE changes")
    await sql("DROP INDEX ix_sessions_expires_at")
    await sql("ALTER TABLE organisations ADD COLUMN colour TEXT")
    assert sorted(await find_problems(database_settings)) == [
        "the column organisations.colour is not of this schema",
        "the index ix_sessions_expires_at is missing",
        "the table changes is missing",
    ]


async def test_damage_of_an_sqlite_file_is_found(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    await upgrade(settings)
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        columns = "id, organisation_id, name, created_at, updated_at, version"
        connection.execute(f"INSERT INTO projects ({columns}) VALUES ('p', 'missing', 'n', 1, 1, 1)")
        rows = [(f"n{number}", b"x" * 3000) for number in range(20)]
        connection.executemany("INSERT INTO installation (name, number, data) VALUES (?, 0, ?)", rows)
    connection.close()
    (found,) = await find_problems(settings)
    assert found.startswith("row 1 of projects refers to a row of organisations")
    content = bytearray((tmp_path / FILE_NAME).read_bytes())
    content[-4096:] = b"\xff" * 4096
    (tmp_path / FILE_NAME).write_bytes(content)
    try:
        problems = await find_problems(settings)
    except UserError as exc:
        problems = [exc.message]
    assert any("damaged" in problem for problem in problems)


@pytest.fixture
def run(database_settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line on the database of the test: exit code, output, errors."""
    monkeypatch.setenv("HELIXFLOW_DATA_DIR", str(database_settings.data_dir))
    monkeypatch.setenv("HELIXFLOW_DATABASE__URL", database_settings.database.url)
    if database_settings.database.password_file is not None:
        monkeypatch.setenv("HELIXFLOW_DATABASE__PASSWORD_FILE", str(database_settings.database.password_file))
    # It would bind every logger of this process to a stream that closes with the test.
    monkeypatch.setattr("helixflow.telemetry.logs.configure_logging", lambda *_args, **_options: None)

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_commands_from_an_empty_database_to_a_sound_one(run: Run) -> None:
    code, out, _ = run("db", "current")
    assert (code, "no schema yet; helixflow db upgrade" in out) == (0, True)
    code, _, err = run("db", "check")
    assert (code, "no schema yet" in err) == (7, True)
    code, out, _ = run("db", "upgrade", "--to", "0001")
    assert (code, f"revision 0001, older than this version's {NEWEST}" in out) == (0, True)
    code, _, err = run("db", "check")
    assert (code, "helixflow db upgrade brings it there" in err) == (7, True)
    code, out, _ = run("db", "upgrade", "--json")
    assert (code, json.loads(out)["state"]) == (0, "current")
    code, out, _ = run("db", "current")
    assert (code, f"revision {NEWEST}, which is this version's" in out) == (0, True)
    code, out, _ = run("db", "check")
    assert (code, out.endswith("the database is fine\n")) == (0, True)
    code, out, _ = run("db", "check", "--json")
    assert (code, json.loads(out)["ok"], json.loads(out)["problems"]) == (0, True, [])


def test_revisions_that_are_unknown_or_behind_are_refused(run: Run) -> None:
    assert run("db", "upgrade")[0] == 0
    code, _, err = run("db", "upgrade", "--to", "0001")
    assert (code, "this command goes only up" in err) == (2, True)
    code, _, err = run("db", "upgrade", "--to", "nonsense")
    assert (code, "there is no revision nonsense" in err) == (2, True)
    assert run("db", "check")[0] == 0


def test_a_database_that_cannot_be_reached_is_exit_code_7(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text("the-password")
    monkeypatch.setenv("HELIXFLOW_DATABASE__URL", f"postgresql://u@/d?host={tmp_path}")
    monkeypatch.setenv("HELIXFLOW_DATABASE__PASSWORD_FILE", str(tmp_path / "password"))
    for words in (("db", "check"), ("db", "current")):
        code, out, err = run(*words)
        assert (code, out) == (7, "")
        assert err.count("\n") == 1
        assert f"postgresql://{tmp_path}:5432/d: nothing listens there" in err
        assert "the-password" not in err
