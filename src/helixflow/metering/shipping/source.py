"""One journal, read as shipments. Everything here blocks: callers use threads."""

import time
from pathlib import Path
from typing import Final

import structlog
from msgspec import Struct

from helixflow.metering.admission import Settlement
from helixflow.metering.journal.reader import JournalReader
from helixflow.metering.journal.records import Admitted, Progressed
from helixflow.metering.shipping.joining import Entry, Joiner
from helixflow.metering.shipping.shipments import Shipment, pack

MAX_RECORDS: Final = 4000

log = structlog.get_logger("helixflow.shipper")


class Batch(Struct, frozen=True):
    """What was read at once. Once the ledger has its `shipments`, the journal may be cut before `needed_from`.

    `since` is when the oldest record was written, as far as its records tell; seconds since the epoch. `is_full`: there
    is more to read at once.
    """

    shipments: list[Shipment]
    position: int
    needed_from: int
    records: int = 0
    bytes: int = 0
    since: float = 0.0
    is_full: bool = False
    interrupted: int = 0
    orphaned: int = 0


class JournalSource:
    """Reads from the oldest record that is there; what the ledger has already, up to `shipped`, is not shipped again.

    `ended`: the writer is gone. Raises what `JournalReader` raises.
    """

    def __init__(self, folder: Path, quarantine: Path, *, shipped: int, ended: bool, keep_settlements: bool) -> None:
        self._journal_id = folder.name
        self._shipped = shipped
        self._ended = ended
        self._reader = JournalReader(folder, quarantine)
        self._joiner = Joiner(self._journal_id, shipped=shipped, keep_settlements=keep_settlements)
        self._quarantined = 0

    @property
    def settlements(self) -> list[Settlement]:
        return self._joiner.settlements

    def read(self) -> Batch | None:
        """None: there is nothing more, for now or, of a journal that has ended, for ever."""
        entries = self._reader.read(MAX_RECORDS, ended=self._ended)
        quarantined = self._reader.quarantined - self._quarantined
        if not entries and not quarantined:
            return None
        self._quarantined += quarantined
        rows = self._joiner.feed(entries)
        position = self._joiner.position
        # Read before: reported before.
        known = position <= self._shipped if entries else position < self._shipped
        return Batch(
            [] if known else list(pack(self._journal_id, rows, position, quarantined=quarantined)),
            position,
            self._joiner.oldest_needed,
            len(entries),
            entries[-1][1] - entries[0][0] if entries else 0,
            _moment(entries),
            len(entries) == MAX_RECORDS,
            orphaned=self._report_orphans(),
        )

    def finish(self) -> Batch:
        """The end of a journal, after all that can be read: the calls that were interrupted, and that it closes."""
        rows = self._joiner.finish()
        position = rows[-1][0] if rows else max(self._joiner.position, self._shipped)
        shipments = list(pack(self._journal_id, rows, position, closes=True))
        return Batch(shipments, position, 0, interrupted=len(rows), since=time.time())

    def cut(self, position: int) -> None:
        """Lets go of what lies before `position`, by whole segments."""
        self._reader.cut(position)

    def _report_orphans(self) -> int:
        orphans = self._joiner.take_orphans()
        if orphans:
            # What they cost is in nobody's account: the admissions, with who it was, are among what was set aside.
            log.error("settlements.orphaned", journal=self._journal_id, calls=len(orphans), first=orphans[0])
        return len(orphans)


def _moment(entries: list[Entry]) -> float:
    for _, _, record in entries:
        match record:
            case Admitted():
                return record.admitted_at_ms / 1000
            case Progressed():
                return record.at_ms / 1000
    return time.time()
