"""Who owns a journal: its writer while it lives, then one taker."""

import asyncio
import fcntl
import os
from pathlib import Path

import pytest

from helixflow.metering.journal.folders import bear, list_journals, take_over
from tests.harness.journal import FaultyFiles, Killed, open_writer


def test_a_journal_is_seen_only_when_it_is_complete_and_locked(tmp_path: Path) -> None:
    with bear(tmp_path / "root") as newborn:
        assert list_journals(tmp_path / "root") == []
    assert list_journals(tmp_path / "root") == [newborn.folder]
    assert newborn.folder.name == newborn.journal_id
    assert len(newborn.journal_id) == 24
    assert take_over(newborn.folder) is None
    for path, mode in ((tmp_path / "root", 0o700), (newborn.folder, 0o700), (newborn.folder / "lock", 0o600)):
        assert path.stat().st_mode & 0o777 == mode
    os.close(newborn.lock)


def test_one_of_two_takers_wins(tmp_path: Path) -> None:
    with bear(tmp_path) as newborn:
        pass
    os.close(newborn.lock)
    first = take_over(newborn.folder)
    assert first is not None
    assert take_over(newborn.folder) is None
    first.release()
    second = take_over(newborn.folder)
    assert second is not None
    second.remove()
    assert take_over(newborn.folder) is None
    assert list_journals(tmp_path) == []


def test_a_journal_that_is_removed_while_another_opens_its_lock_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bear(tmp_path) as newborn:
        pass
    os.close(newborn.lock)
    first = take_over(newborn.folder)
    assert first is not None
    lock = fcntl.flock

    def remove_first(fd: int, operation: int) -> None:
        first.remove()
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    assert take_over(newborn.folder) is None


def test_what_a_killed_writer_left_unborn_is_cleared_by_the_next(tmp_path: Path) -> None:
    files = FaultyFiles()
    writer = open_writer(tmp_path / "count", files=files)
    boundaries = len(files.boundaries)
    asyncio.run(writer.close())
    for boundary in range(boundaries):
        root = tmp_path / f"{boundary}"
        with pytest.raises(Killed):
            open_writer(root, files=FaultyFiles(kill_at=boundary))
        # `Killed` is an exception, so that the folder was cleaned up; a real one leaves it.
        (root / ".new-0123456789abcdef01234567").mkdir()
        (root / ".gone-0123456789abcdef01234567").mkdir()
        assert list_journals(root) == []
        with bear(root) as newborn:
            pass
        os.close(newborn.lock)
        assert sorted(path.name for path in root.iterdir()) == [".birth", newborn.journal_id]


def test_what_else_lies_there_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "quarantine").mkdir()
    assert list_journals(tmp_path) == []
    assert list_journals(tmp_path / "nowhere") == []
