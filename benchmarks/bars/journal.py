"""What a gateway's journal costs: a record written, beside a bare `pwrite`; read again; waited for on the disk."""

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

from benchmarks.report import Options, Result, median, number, spread
from helixflow.core.clock import SystemClock
from helixflow.metering.journal.reader import JournalReader
from helixflow.metering.journal.records import Admitted, Settled, Tokens
from helixflow.metering.journal.writer import JournalWriter
from helixflow.telemetry.logs import configure_logging

_CALLS = 10_000
# As many as are in flight together; each batch leaves the event loop to the journal's own work once.
_BATCH = 100
_WAITERS = 64
_SEGMENT_BYTES = 8 * 2**20


def run(options: Options) -> list[Result]:
    configure_logging("error", "text", service="benchmarks")
    with tempfile.TemporaryDirectory(prefix="hf-") as name:
        return asyncio.run(_measure(Path(name), options))


async def _measure(root: Path, options: Options) -> list[Result]:
    records = [(_admitted(number), _settled(number)) for number in range(_CALLS)]
    written, bare, read = [], [], []
    for _ in range(options.rounds):
        async with _journal(root, "os") as writer:
            written.append(await _write(writer, records))
        size = writer.figures.bytes // writer.figures.records
        bare.append(_write_bare(root, size))
        read.append(_read(writer.folder, root))
    ratio = median(written) / median(bare)
    waited = await _commit(root, records, options)
    return [
        Result("journal", "a record written", median(written), "µs", 6.0, detail=f"{spread(written)}, {size} bytes"),
        Result("journal", "beside a bare pwrite", ratio, "×", detail=f"{number(median(bare))} µs"),
        Result("journal", "records read", median(read), "/s", detail=spread(read)),
        waited,
    ]


@contextlib.asynccontextmanager
async def _journal(root: Path, durability: Literal["os", "disk"]) -> AsyncIterator[JournalWriter]:
    """A writer that runs, with its next segment prepared."""
    writer = JournalWriter.open(
        root, segment_bytes=_SEGMENT_BYTES, durability=durability, sync_interval_s=1, clock=SystemClock()
    )
    running = asyncio.create_task(writer.run())
    async with asyncio.timeout(60):
        while len(list(writer.folder.iterdir())) < 3:
            await asyncio.sleep(0.01)
    try:
        yield writer
    finally:
        running.cancel()
        await asyncio.wait((running,))
        await writer.close()


async def _write(writer: JournalWriter, records: list[tuple[Admitted, Settled]]) -> float:
    """Microseconds of CPU a record."""
    spent = 0.0
    for begin in range(0, len(records), _BATCH):
        batch = records[begin : begin + _BATCH]
        started = time.thread_time()
        for admitted, _ in batch:
            writer.admit(admitted)
        for _, settled in batch:
            writer.settle(settled)
        spent += time.thread_time() - started
        await asyncio.sleep(0)
    return spent / (2 * len(records)) * 1e6


def _write_bare(root: Path, size: int) -> float:
    """Microseconds of CPU a `pwrite` of as many bytes takes, into a file of the same kind."""
    data, writes = bytes(size), 2 * _CALLS
    fd = os.open(root / "bare", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(fd, 0, size * writes)
        started = time.thread_time()
        for place in range(writes):
            os.pwrite(fd, data, place * size)
        return (time.thread_time() - started) / writes * 1e6
    finally:
        os.close(fd)
        (root / "bare").unlink()


def _read(folder: Path, root: Path) -> float:
    """Records a second of CPU."""
    reader, records = JournalReader(folder, root / "quarantine"), 0
    started = time.thread_time()
    while found := reader.read(1000, ended=True):
        records += len(found)
    spent = time.thread_time() - started
    if records != 2 * _CALLS + 1 or reader.quarantined:
        raise RuntimeError(f"{records} records were read back, {reader.quarantined} damaged")
    return records / spent


async def _commit(root: Path, records: list[tuple[Admitted, Settled]], options: Options) -> Result:
    """Calls that each wait for the disk, twice."""
    done = 0

    async def call(writer: JournalWriter, until: float) -> None:
        nonlocal done
        while time.perf_counter() < until:
            admitted, settled = records[done % _CALLS]
            for position in (writer.admit(admitted), writer.settle(settled)):
                if (wait := writer.durable(position)) is not None:
                    await asyncio.wait_for(wait, 30)
            done += 1

    async with _journal(root, "disk") as writer:
        syncs, started = writer.figures.syncs, time.perf_counter()
        until = started + options.window_s
        await asyncio.gather(*(call(writer, until) for _ in range(_WAITERS)))
        spent = time.perf_counter() - started
        syncs = writer.figures.syncs - syncs
    detail = f"{_WAITERS} at a time, {number(2 * done / syncs)} records a sync of {number(spent / syncs * 1e3)} ms"
    return Result("journal", "records on the disk", 2 * done / spent, "/s", detail=detail)


def _admitted(number: int) -> Admitted:
    """As a request of a team with tags, two limits and a budget."""
    holds = ((f"l:{'d' * 20}", 1), (f"l:{'e' * 20}", 700), (f"b:{'f' * 20}:1700000000000", 123_456))
    return Admitted(
        f"{number:032x}",
        1_700_000_000_000 + number,
        f"req-{number:032x}",
        "org_" + "a" * 20,
        "proj_" + "b" * 20,
        "key_" + "c" * 20,
        "",
        "llama-3.1-8b-instruct",
        "openai_chat",
        "chat",
        True,
        {"team": "search", "environment": "production"},
        holds,
        "api_key",
        ("limit_" + "d" * 20, "limit_" + "e" * 20, "budget_" + "f" * 20),
        700,
        123_456,
    )


def _settled(number: int) -> Settled:
    tokens = Tokens(300, 0, 180, 0, True)
    return Settled(f"{number:032x}", "llama-3.1-8b/0", 200, "completed", "", tokens, 98_765, "p1", 1, 120, 2_500, 2_300)
