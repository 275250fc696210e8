"""Journals of real processes: killed, followed, out of room."""

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Self

import pytest

from helixflow.metering.journal.folders import list_journals, take_over
from helixflow.metering.journal.reader import JournalReader
from helixflow.metering.journal.records import Admitted, Closed, Progressed, Record, Settled
from tests.harness.journal_process import IN_FLIGHT

DEADLINE_S = 60.0
KINDS = (Admitted, Progressed, Settled)
SEGMENT_BYTES = 64 * 1024


class Writing:
    """A process that writes a journal below `root`; what it prints goes to a file."""

    def __init__(self, root: Path, calls: int, *limit: int) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        arguments = (str(root), str(SEGMENT_BYTES), str(calls), *map(str, limit))
        command = [sys.executable, "-m", "tests.harness.journal_process", *arguments]
        self._process = subprocess.Popen(command, stdout=self._output)
        self._root = root

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._output.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def printed(self) -> list[bytes]:
        """The lines so far."""
        return os.pread(self._output.fileno(), 1 << 26, 0).split(b"\n")[:-1]

    def born(self) -> Path:
        """Its journal, once it is there."""
        deadline = time.monotonic() + DEADLINE_S
        while not (lines := self.printed()):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return self._root / lines[0].decode()


def follow(reader: JournalReader) -> list[Record]:
    """What a living journal says until it is closed, read while it is written."""
    deadline = time.monotonic() + DEADLINE_S
    records: list[Record] = []
    while not (records and isinstance(records[-1], Closed)):
        assert time.monotonic() < deadline
        records += [record for _, _, record in reader.read(500, ended=False)]
    return records


def check_order(records: list[Record]) -> None:
    """As the process wrote it: each call admitted, then progressing if there was room, then settled, in their order."""
    numbers = {kind: [int(one.call_id, 16) for one in records if isinstance(one, kind)] for kind in KINDS}
    for kind in (Admitted, Settled):
        assert numbers[kind] == list(range(len(numbers[kind])))
    assert numbers[Progressed] == sorted(set(numbers[Progressed]))
    assert 0 <= len(numbers[Admitted]) - len(numbers[Settled]) <= IN_FLIGHT + 1


@pytest.mark.parametrize("round", range(4))
def test_a_killed_process_loses_nothing_that_it_had_written(tmp_path: Path, round: int) -> None:
    """Five at a time, so that it takes less."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(Writing(tmp_path, 0)) for _ in range(5)]
        journals = [process.born() for process in processes]
        assert list_journals(tmp_path) == sorted(journals)
        for process, journal in zip(processes, journals, strict=True):
            assert take_over(journal) is None
            time.sleep(random.uniform(0, 0.03))
            process.kill()
            ownership = take_over(journal)
            assert ownership is not None
            reader = JournalReader(journal, tmp_path / "quarantine")
            records, position = [], 0
            while found := reader.read(500, ended=True):
                records += [record for _, _, record in found]
                position = found[-1][1]
            check_order(records)
            assert position >= max(map(int, process.printed()[1:]), default=0)
            # The kernel may end a process within a write.
            assert reader.quarantined <= 1
            ownership.remove()
    assert list_journals(tmp_path) == []


def test_a_journal_is_followed_and_cut_while_another_process_writes_it(tmp_path: Path) -> None:
    calls = 4000
    with Writing(tmp_path, calls) as process:
        folder = process.born()
        reader = JournalReader(folder, tmp_path / "quarantine")
        records: list[Record] = []
        deadline = time.monotonic() + DEADLINE_S
        while not (records and isinstance(records[-1], Closed)):
            assert time.monotonic() < deadline
            found = reader.read(500, ended=False)
            records += [record for _, _, record in found]
            if found:
                reader.cut(found[-1][1])
    check_order(records)
    assert Counter(type(record) for record in records)[Settled] == calls
    assert reader.quarantined == 0
    assert len(list(folder.iterdir())) < 5, "the lock, the last segment and those prepared"


def test_a_process_that_may_write_no_more_settles_what_it_admitted(tmp_path: Path) -> None:
    """The kernel tears the write that crosses the limit, and refuses new segments."""
    with Writing(tmp_path, 400, SEGMENT_BYTES // 3 + 17) as process:
        reader = JournalReader(process.born(), tmp_path / "quarantine")
        records = follow(reader)
    check_order(records)
    kinds = Counter(type(record) for record in records)
    assert (kinds[Admitted], kinds[Settled], reader.quarantined) == (400, 400, 0)
