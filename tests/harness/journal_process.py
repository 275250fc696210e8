"""`python -m tests.harness.journal_process root segment_bytes calls`: a gateway that only writes its journal.

The first line on standard output is the journal's name. Each time writes have returned, a line with the end position
follows. With 0 calls it goes on until it is killed. With `limit` as a fourth argument, files may have only so many
bytes, until half of the calls are made or one is refused.
"""

import asyncio
import contextlib
import os
import resource
import sys
from pathlib import Path

from helixflow.core.errors import HelixError
from helixflow.metering.journal.writer import JournalWriter
from tests.harness.journal import admitted, open_writer, progressed, settled

IN_FLIGHT = 5


def main() -> None:
    root, segment_bytes, calls = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    limit = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    asyncio.run(_write(root, segment_bytes, calls, limit))


async def _write(root: Path, segment_bytes: int, calls: int, limit: int) -> None:
    writer = open_writer(root, segment_bytes=segment_bytes)
    os.write(1, f"{writer.journal_id}\n".encode())
    running = asyncio.create_task(writer.run())
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    number = 0
    while not calls or number < calls + IN_FLIGHT:
        if limit and number == calls // 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        if not calls or number < calls:
            await _admit(writer, number, unlimited)
            writer.progress(progressed(number))
        if number >= IN_FLIGHT:
            writer.settle(settled(number - IN_FLIGHT))
        os.write(1, f"{writer.position}\n".encode())
        number += 1
        if number % 20 == 0:
            await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait((running,))
    await writer.close()


async def _admit(writer: JournalWriter, number: int, unlimited: tuple[int, int]) -> None:
    """Until there is room: the first refusal makes the disk larger."""
    while True:
        with contextlib.suppress(HelixError):
            writer.admit(admitted(number))
            return
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        await asyncio.sleep(0.001)


if __name__ == "__main__":
    main()
