"""How rows are packed for the way: in shipments that are small enough for one message and one transaction."""

from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import Struct

from helixflow.metering.rows import Positioned, encode_rows

MAX_ROWS: Final = 2000
# Half of what a message may have, see `rpc.channels.MAX_MESSAGE_BYTES`.
MAX_BYTES: Final = 2 * 2**20


class Shipment(Struct, frozen=True):
    """One message to the ledger: `count` encoded rows, up to `position`. Fields as of `ShipRecordsRequest`."""

    journal_id: str
    position: int
    rows: bytes = b""
    count: int = 0
    closes: bool = False
    quarantined: int = 0


def pack(
    journal_id: str, rows: Sequence[Positioned], position: int, *, closes: bool = False, quarantined: int = 0
) -> Iterator[Shipment]:
    """At least one shipment, in order. Only the last goes up to `position`, closes, and reports what was set aside."""
    pieces = list(_pieces(rows))
    for piece, data in pieces[:-1]:
        yield Shipment(journal_id, piece[-1][0], data, len(piece))
    piece, data = pieces[-1] if pieces else ([], b"")
    yield Shipment(journal_id, position, data, len(piece), closes, quarantined)


def _pieces(rows: Sequence[Positioned]) -> Iterator[tuple[Sequence[Positioned], bytes]]:
    if not rows:
        return
    if len(rows) <= MAX_ROWS:
        data = encode_rows(rows)
        if len(data) <= MAX_BYTES or len(rows) == 1:
            yield rows, data
            return
    middle = len(rows) // 2
    yield from _pieces(rows[:middle])
    yield from _pieces(rows[middle:])
