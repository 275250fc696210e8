"""The shipper as a process of its own: what it ships, tells and leaves."""

import asyncio
import signal
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from helixflow.core.errors import ExitCode
from helixflow.launch.serve import write_settings
from helixflow.metering.shipping.figures import ShipperStatus, read_status
from helixflow.rpc.sockets import prepare_run_dir, socket_path
from helixflow.settings.tree import LogSettings, MeteringSettings, Settings
from tests.harness.journals import WrittenJournal, admitted, call_id
from tests.harness.pki import Pki
from tests.harness.scripted_ledger import ScriptedLedger, serving

WAIT_S = 60.0


@pytest.fixture
def settings(tmp_path: Path, pki: Pki) -> Settings:
    metering = MeteringSettings(ship_interval_s=0.02)
    settings = Settings(data_dir=tmp_path, metering=metering, log=LogSettings(level="debug", format="json"))
    prepare_run_dir(settings.run_dir)
    return settings


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[asyncio.subprocess.Process]:
    settings_fd = write_settings(settings)
    argv = ["-m", "helixflow.launch.shipper", "--settings-fd", str(settings_fd)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *argv, pass_fds=[settings_fd], stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def stop(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    """Exit status and log."""
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(WAIT_S):
        _, output = await process.communicate()
    return process.returncode, output.decode()


async def status_of(settings: Settings, *, rows: int) -> ShipperStatus:
    """What it tells once so many are shipped."""
    async with asyncio.timeout(WAIT_S):
        while (status := read_status(settings.run_dir)) is None or status.shipped_rows < rows or status.backlog_bytes:
            await asyncio.sleep(0.02)
    return status


async def test_it_ships_tells_how_far_it_is_and_on_sigterm_brings_the_rest(settings: Settings, pki: Pki) -> None:
    ledger = ScriptedLedger()
    living, dead = WrittenJournal(settings.journal_dir), WrittenJournal(settings.journal_dir)
    living.write_call(1)
    dead.write(admitted(call_id(2)))
    dead.die()
    async with (
        serving(ledger, socket_path(settings.run_dir, "control"), pki.identity("control")),
        running(settings) as process,
    ):
        await ledger.until(lambda: len(ledger.rows) == 2, WAIT_S)
        status = await status_of(settings, rows=2)
        assert (status.interrupted, status.backlog_records, status.last_error) == (1, 0, "")
        assert stat.S_IMODE((settings.run_dir / "shipper.json").stat().st_mode) == 0o600
        assert {book.node_id for book in ledger.books.values()} == {(settings.data_dir / "node.id").read_text().strip()}
        living.write_call(3)
        living.end()
        code, output = await stop(process)
    assert code == ExitCode.OK, output
    assert sorted(row.call_id for row in ledger.rows) == [call_id(1), call_id(2), call_id(3)]
    assert all(book.closed for book in ledger.books.values())
    assert not living.folder.exists()


async def test_what_cannot_be_shipped_in_time_stays_for_the_next_start(settings: Settings, pki: Pki) -> None:
    journal = WrittenJournal(settings.journal_dir)
    journal.write_call(1)
    journal.end()
    async with running(settings) as process:
        async with asyncio.timeout(WAIT_S):
            while (status := read_status(settings.run_dir)) is None or not status.last_error:
                await asyncio.sleep(0.02)
        assert status.backlog_bytes > 0
        code, output = await stop(process)
    assert code == ExitCode.OK, output
    assert '"shipper.left"' in output
    ledger = ScriptedLedger()
    async with (
        serving(ledger, socket_path(settings.run_dir, "control"), pki.identity("control")),
        running(settings) as process,
    ):
        await ledger.until(lambda: len(ledger.rows) == 1, WAIT_S)
        assert (await stop(process))[0] == ExitCode.OK
    assert not journal.folder.exists()


async def test_a_node_without_a_certificate_for_it_says_what_to_do(settings: Settings, pki: Pki) -> None:
    pki.folder.service_file("shipper").unlink()
    async with running(settings) as process:
        async with asyncio.timeout(WAIT_S):
            _, output = await process.communicate()
        assert process.returncode == ExitCode.CONFIG
    assert b"helixflow pki init" in output
