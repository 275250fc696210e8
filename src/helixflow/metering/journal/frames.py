"""How records lie in a file.

A segment begins with a header: magic, version of the format, its start position, its size, CRC-32 of all that. Records
follow, each framed as magic, length of the payload, CRC-32 of version and payload, version, payload. A frame without
payload is the end of its segment: the next record is in the next. Where nothing was written yet are zeros. All numbers
are little-endian.

Positions are bytes since the beginning of the journal. A checksum starts from its frame's position, so that a frame in
a wrong place is none; and the magic is no UTF-8, so that no text within a record is ever taken for a frame by a reader
that searches for the next one after damage.
"""

import struct
from typing import Final
from zlib import crc32

from msgspec import Struct

from helixflow.metering.journal.records import MAX_RECORD_BYTES

FORMAT_VERSION: Final = 1
MAGIC: Final = b"\xff\xfeHJ"
MASK: Final = 0xFFFFFFFF

FRAME: Final = struct.Struct("<4sII")
# What a frame takes beside its payload.
OVERHEAD: Final = FRAME.size + 1
MAX_PAYLOAD_BYTES: Final = MAX_RECORD_BYTES - OVERHEAD

_VERSION: Final = bytes([FORMAT_VERSION])
_SEGMENT_MAGIC: Final = b"\xff\xfeHFJRNL"
_SEGMENT: Final = struct.Struct("<8sIQQ")
_CHECKSUM: Final = struct.Struct("<I")
SEGMENT_HEADER_BYTES: Final = _SEGMENT.size + _CHECKSUM.size


class SegmentHeader(Struct, frozen=True):
    """`start` is the position of the header's first byte, `size` the bytes of the whole file."""

    version: int
    start: int
    size: int


def encode_frame(payload: bytes, position: int) -> bytes:
    """The frame that begins at `position`. Without payload: the end of the segment."""
    body = _VERSION + payload
    return FRAME.pack(MAGIC, len(payload), crc32(body, position & MASK)) + body


def frame_end(block: bytes, offset: int, position: int) -> int | None:
    """Where the frame ends that begins at `offset` of `block`, which is `position`; None when there is no sound one."""
    if len(block) - offset < OVERHEAD:
        return None
    magic: bytes
    length: int
    magic, length, checksum = FRAME.unpack_from(block, offset)
    if magic != MAGIC or length > MAX_PAYLOAD_BYTES:
        return None
    body = block[offset + FRAME.size : offset + OVERHEAD + length]
    if len(body) != length + 1 or crc32(body, position & MASK) != checksum:
        return None
    return offset + OVERHEAD + length


def encode_segment_header(start: int, size: int) -> bytes:
    header = _SEGMENT.pack(_SEGMENT_MAGIC, FORMAT_VERSION, start, size)
    return header + _CHECKSUM.pack(crc32(header))


def decode_segment_header(data: bytes) -> SegmentHeader | None:
    """None for what is none. It may be of a version that is newer than ours."""
    if len(data) < SEGMENT_HEADER_BYTES:
        return None
    header, checksum = data[: _SEGMENT.size], data[_SEGMENT.size : SEGMENT_HEADER_BYTES]
    magic, version, start, size = _SEGMENT.unpack(header)
    if magic != _SEGMENT_MAGIC or _CHECKSUM.pack(crc32(header)) != checksum:
        return None
    return SegmentHeader(version, start, size)
