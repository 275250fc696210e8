"""A log that cannot be written is lost, and nothing else."""

import errno
import io

from helixflow.telemetry.logs import UnfailingStream


class FullDisk(io.StringIO):
    full = True

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "no space left")
        return super().write(text)


def test_a_full_disk_is_counted_and_survived() -> None:
    disk = FullDisk()
    stream = UnfailingStream(disk)
    print("one", file=stream, flush=True)  # type: ignore[arg-type]
    assert stream.lost > 0
    disk.full = False
    print("two", file=stream, flush=True)  # type: ignore[arg-type]
    assert disk.getvalue() == "two\n"
