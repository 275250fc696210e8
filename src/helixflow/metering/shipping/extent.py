"""How far a journal has been written, seen from outside: for figures, not for decisions."""

import os
from pathlib import Path
from typing import Final

from helixflow.metering.journal.frames import SEGMENT_HEADER_BYTES
from helixflow.metering.journal.segments import list_segments

_PAGE: Final = 4096


def measure_end(folder: Path) -> int:
    """The position after the last record, give or take a page. Blocks for some microseconds; raises `OSError`.

    What was not written yet is zeros, so the end is found by halving; a newest segment may be wholly unused.
    """
    end = 0
    for start, path in reversed(list_segments(folder)):
        used = _measure_used(path)
        end = start + used
        if used > SEGMENT_HEADER_BYTES:
            break
    return end


def _measure_used(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        low, high = 0, -(-os.fstat(descriptor).st_size // _PAGE)
        while low < high:
            middle = (low + high) // 2
            if _is_written(os.pread(descriptor, _PAGE, middle * _PAGE)):
                low = middle + 1
            else:
                high = middle
        last = max(0, low - 1) * _PAGE
        return last + len(os.pread(descriptor, _PAGE, last).rstrip(b"\0"))
    finally:
        os.close(descriptor)


def _is_written(page: bytes) -> bool:
    return bool(page.rstrip(b"\0"))
