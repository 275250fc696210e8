"""How far a journal has been written, seen from outside: for figures, not for decisions."""

import os
from pathlib import Path
from typing import Final

from helixflow.metering.journal.frames import SEGMENT_HEADER_BYTES
from helixflow.metering.journal.segments import list_segments

_PAGE: Final = 4096


def measure(folder: Path) -> tuple[int, int]:
    """Positions of the first record there is and after the last one, give or take a page; (0, 0) when it is gone.

    Blocks for some microseconds; raises `OSError`. What was not written yet is zeros, so the end is found by halving; a
    newest segment may be wholly unused.
    """
    segments = list_segments(folder)
    if not segments:
        return 0, 0
    begin = segments[0][0] + SEGMENT_HEADER_BYTES
    for start, path in reversed(segments):
        if (used := _measure_used(path)) > SEGMENT_HEADER_BYTES:
            return begin, start + used
    return begin, begin


def _measure_used(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        low, high = 0, -(-os.fstat(descriptor).st_size // _PAGE)
        while low < high:
            middle = (low + high) // 2
            if os.pread(descriptor, _PAGE, middle * _PAGE).rstrip(b"\0"):
                low = middle + 1
            else:
                high = middle
        last = max(0, low - 1) * _PAGE
        return last + len(os.pread(descriptor, _PAGE, last).rstrip(b"\0"))
    finally:
        os.close(descriptor)
