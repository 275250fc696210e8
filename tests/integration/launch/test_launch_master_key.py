"""The master key of a data directory is replaced, and whatever ends that halfway can be completed."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from helixflow.auth.master_key_file import kept_beside, read_key_file, staged_beside
from helixflow.auth.service import create_auth
from helixflow.core.errors import ExitCode, UserError
from helixflow.launch import master_key
from helixflow.launch.lock import lock_data_dir
from helixflow.launch.master_key import Replaced, replace
from helixflow.rpc.sockets import prepare_run_dir
from helixflow.settings.tree import AuthSettings, Settings

SECONDS = 120


class Cut(Exception):
    """Stands for the end of the process."""


def start(settings: Settings) -> None:
    """What a start does before it serves, a first signing key included. Raises `UserError`."""

    async def run() -> None:
        services = await create_auth(settings, None)
        try:
            await services._rotation.ensure_first()
        finally:
            await services.close()

    asyncio.run(asyncio.wait_for(run(), SECONDS))


@pytest.fixture(autouse=True)
def quick_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signing key of 4096 bits takes up to 1.5 s to make."""
    monkeypatch.setattr("helixflow.auth.signing_key_rotation.KEY_BITS", 2048)


@pytest.fixture
def settings(database_settings: Settings) -> Settings:
    """Of a data directory from which something has been served."""
    start(database_settings)
    return database_settings


@pytest.fixture
def sqlite(tmp_path: Path) -> Settings:
    """The same for what does not depend on the kind of database."""
    settings = Settings(data_dir=tmp_path / "data")
    start(settings)
    return settings


def own(settings: Settings) -> Path:
    return settings.data_dir / "master.key"


def refusal(settings: Settings, new: Path, *, lost: bool = False) -> UserError:
    with pytest.raises(UserError) as caught:
        replace(settings, new, lost=lost)
    return caught.value


def refused_start(settings: Settings) -> str:
    with pytest.raises(UserError) as caught:
        start(settings)
    assert caught.value.exit_code is ExitCode.CONFIG
    assert "\n" not in caught.value.message
    return caught.value.message


def test_the_new_key_is_made_and_takes_the_place_of_the_old_one(settings: Settings, tmp_path: Path) -> None:
    old, new = read_key_file(own(settings)), tmp_path / "next.key"
    replaced = replace(settings, new, lost=False)
    assert replaced.counts["token_keys"] == 1
    assert (replaced.file, replaced.kept) == (own(settings), kept_beside(own(settings)))
    assert read_key_file(own(settings)) == read_key_file(new) != old
    assert read_key_file(kept_beside(own(settings))) == old
    for file in (new, own(settings), kept_beside(own(settings))):
        assert file.stat().st_mode & 0o777 == 0o600
    assert not staged_beside(own(settings)).exists()
    start(settings)
    # Again: there is nothing left to do.
    assert replace(settings, new, lost=False) == Replaced({}, own(settings))
    assert read_key_file(kept_beside(own(settings))) == old


def test_a_lost_key_is_given_up(settings: Settings, tmp_path: Path) -> None:
    own(settings).unlink()
    # What a start makes of it: a key that opens nothing.
    assert "if it is lost for good" in refused_start(settings)
    assert refusal(settings, tmp_path / "next.key").exit_code is ExitCode.CONFIG
    replaced = replace(settings, tmp_path / "next.key", lost=True)
    assert replaced.counts["token_keys"] == 1
    start(settings)


@pytest.mark.parametrize("again", ["new", "staged"])
def test_cut_off_between_the_commit_and_the_change_of_files(
    sqlite: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    new = tmp_path / "next.key"
    with monkeypatch.context() as patch:
        patch.setattr(master_key, "put_in_place", cut)
        with pytest.raises(Cut):
            replace(sqlite, new, lost=False)
    old, staged = read_key_file(own(sqlite)), staged_beside(own(sqlite))
    assert refused_start(sqlite).endswith(
        f"but {staged} is; put it in place with: helixflow auth replace-master-key --new-key-file {staged}"
    )
    # Nothing is lost, and what is staged is not overwritten.
    assert str(staged) in refusal(sqlite, tmp_path / "third.key", lost=True).message
    assert str(staged) in refusal(sqlite, tmp_path / "third.key").message
    # As the message says, or as before.
    replaced = replace(sqlite, new if again == "new" else staged, lost=False)
    assert replaced == Replaced({}, own(sqlite), kept_beside(own(sqlite)))
    assert read_key_file(own(sqlite)) == read_key_file(new)
    assert read_key_file(kept_beside(own(sqlite))) == old
    assert not staged.exists()
    start(sqlite)


def test_cut_off_before_the_commit(sqlite: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = tmp_path / "next.key"
    with monkeypatch.context() as patch:
        patch.setattr(master_key, "replace_master_key", cut)
        with pytest.raises(Cut):
            replace(sqlite, new, lost=False)
    start(sqlite)
    assert replace(sqlite, new, lost=False).counts
    start(sqlite)


def test_files_that_cannot_be_changed_are_named_and_the_next_run_completes(
    sqlite: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> Path:
        raise UserError(f"{path}: cannot be replaced: No space left on device", ExitCode.STORAGE)

    with monkeypatch.context() as patch:
        patch.setattr(master_key, "put_in_place", full)
        refused = refusal(sqlite, tmp_path / "next.key")
    assert refused.exit_code is ExitCode.STORAGE
    assert "the database is sealed with the new key already" in refused.message
    replace(sqlite, tmp_path / "next.key", lost=False)
    start(sqlite)


def test_a_database_from_before_takes_the_key_that_was_kept(sqlite: Settings, tmp_path: Path) -> None:
    backup = (sqlite.data_dir / "helixflow.db").read_bytes()
    replace(sqlite, tmp_path / "next.key", lost=False)
    (sqlite.data_dir / "helixflow.db").write_bytes(backup)
    kept = kept_beside(own(sqlite))
    assert f"--new-key-file {kept}" in refused_start(sqlite)
    old = read_key_file(kept)
    assert replace(sqlite, kept, lost=False).counts == {}
    assert read_key_file(own(sqlite)) == old
    assert read_key_file(kept) == read_key_file(tmp_path / "next.key")
    start(sqlite)


def test_a_key_that_is_at_hand_is_not_lost(sqlite: Settings, tmp_path: Path) -> None:
    refused = refusal(sqlite, tmp_path / "next.key", lost=True)
    assert (refused.exit_code, str(own(sqlite)) in refused.message) == (ExitCode.USAGE, True)
    assert not (tmp_path / "next.key").exists()


def test_a_place_of_the_operators_own_is_left_to_the_operator(sqlite: Settings, tmp_path: Path) -> None:
    elsewhere = tmp_path / "secret"
    own(sqlite).rename(elsewhere)
    settings = sqlite.model_copy(update={"auth": AuthSettings(master_key_file=elsewhere)})
    before = elsewhere.read_bytes()
    replaced = replace(settings, tmp_path / "next.key", lost=False)
    assert (replaced.file, replaced.kept, elsewhere.read_bytes()) == (None, None, before)
    assert "which was replaced on 20" in refused_start(settings)
    (tmp_path / "next.key").replace(elsewhere)
    start(settings)


def test_it_is_refused_while_something_serves(sqlite: Settings, tmp_path: Path) -> None:
    prepare_run_dir(sqlite.run_dir)
    held = lock_data_dir(sqlite.run_dir)
    try:
        refused = refusal(sqlite, tmp_path / "next.key")
    finally:
        os.close(held)
    assert refused.exit_code is ExitCode.UNAVAILABLE
    assert str(os.getpid()) in refused.message
    assert not (tmp_path / "next.key").exists()


def test_without_a_database_there_is_nothing_to_replace(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    assert "nothing is sealed yet" in refusal(settings, tmp_path / "next.key").message
    assert not (tmp_path / "next.key").exists() and not (settings.data_dir / "helixflow.db").exists()


@pytest.mark.parametrize(("content", "mode"), [("ab" * 31, 0o600), ("ab" * 32, 0o644)])
def test_a_new_key_that_is_none_or_open_to_others_is_refused(
    sqlite: Settings, tmp_path: Path, content: str, mode: int
) -> None:
    new = tmp_path / "next.key"
    new.write_text(content)
    new.chmod(mode)
    refused = refusal(sqlite, new)
    assert (refused.exit_code, content in refused.message) == (ExitCode.CONFIG, False)
    start(sqlite)


def cut(*_arguments: Any) -> None:
    raise Cut
