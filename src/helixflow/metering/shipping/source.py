"""One journal, read as shipments. Everything here blocks: callers use threads."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog
from msgspec import Struct

from helixflow.metering.admission import Settlement
from helixflow.metering.journal.reader import JournalReader
from helixflow.metering.journal.records import Admitted, Progressed
from helixflow.metering.shipping.joining import INTERRUPTED_BASE, Entry, Joiner
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
    # For who closes the journal, where that is asked for.
    settlements: Sequence[Settlement] = ()


class JournalSource:
    """Reads from the oldest record that is there; what the ledger has already, up to `shipped`, is not shipped again.

    `ended`: the writer is gone. `expiry_ms` and `keep_settlements` as of `Joiner`. Raises what `JournalReader` raises.
    """

    def __init__(
        self,
        folder: Path,
        quarantine: Path,
        *,
        shipped: int,
        ended: bool,
        keep_settlements: bool,
        expiry_ms: int | None = None,
    ) -> None:
        self._journal_id = folder.name
        self._shipped = shipped
        self._ended = ended
        self._reader = JournalReader(folder, quarantine)
        self._joiner = Joiner(self._journal_id, shipped=shipped, keep_settlements=keep_settlements, expiry_ms=expiry_ms)
        self._quarantined = 0
        self._expired = 0

    def read(self) -> Batch | None:
        """None: there is nothing more, for now or, of a journal that has ended, for ever."""
        entries: list[Entry] = []
        # It pauses for breath between segments.
        while len(entries) < MAX_RECORDS and (more := self._reader.read(MAX_RECORDS - len(entries), ended=self._ended)):
            entries += more
        if not entries:
            return None
        rows = self._joiner.feed(entries)
        position = self._joiner.position
        is_new = position > self._shipped
        return Batch(
            list(pack(self._journal_id, rows, position, quarantined=self._take_quarantined())) if is_new else [],
            position,
            self._joiner.oldest_needed,
            len(entries),
            entries[-1][1] - entries[0][0],
            _moment(entries),
            len(entries) == MAX_RECORDS,
            interrupted=self._report_expired(),
            orphaned=self._report_orphans(),
            settlements=self._joiner.take_settlements(),
        )

    def finish(self) -> Batch:
        """The end of a journal, after all that can be read: the calls that were interrupted, and that it closes."""
        rows = self._joiner.finish()
        # Past all rows, so that what was set aside at the very end is counted with it.
        position = INTERRUPTED_BASE + self._joiner.position
        quarantined = self._take_quarantined()
        shipments = list(pack(self._journal_id, rows, position, closes=True, quarantined=quarantined))
        return Batch(
            shipments,
            position,
            0,
            interrupted=len(rows),
            since=time.time(),
            settlements=self._joiner.take_settlements(),
        )

    def cut(self, position: int) -> None:
        """Lets go of what lies before `position`, by whole segments."""
        self._reader.cut(position)

    def _take_quarantined(self) -> int:
        """Stretches since the last time. Those before what the ledger has were reported with that."""
        count = self._reader.quarantined_from(self._shipped) - self._quarantined
        self._quarantined += count
        return count

    def _report_expired(self) -> int:
        count = self._joiner.expired - self._expired
        self._expired += count
        if count:
            log.error("calls.unsettled", journal=self._journal_id, calls=count, advice="they count as interrupted")
        return count

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
