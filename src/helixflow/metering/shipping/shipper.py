"""The shipper of a node: brings the journals of all its gateways to the ledger, the dead ones' to their end."""

import asyncio
import contextlib
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from helixflow.core.errors import HelixError, UserError
from helixflow.metering.journal.folders import list_journals
from helixflow.metering.shipping.extent import measure
from helixflow.metering.shipping.figures import JournalFigures, ShipperStatus
from helixflow.metering.shipping.journal import JournalShipping, Office
from helixflow.metering.shipping.lost import LOST_BASE, make_lost_row
from helixflow.metering.shipping.shipments import Shipment, pack
from helixflow.metering.spend import ABANDONED

# A journal that the ledger refused, or that cannot be read, is tried again after so long.
RETRY_S: Final = 30.0
LOST_CHECK_S: Final = 60.0
# What `ShipperStatus.last_error` says of a journal that cannot be read.
UNREADABLE: Final = "journal_unreadable"

log = structlog.get_logger("helixflow.shipper")


class Shipper:
    """Follows the journals below `root`, each for itself: one that is refused does not keep the others."""

    def __init__(self, root: Path, office: Office) -> None:
        self._root = root
        self._office = office
        self._figures = office.figures
        self._ended: set[str] = set()

    async def run(self) -> None:
        """Runs until cancelled, or, after `drain`, until all that is there has been shipped."""
        async with asyncio.TaskGroup() as tasks:
            lost = tasks.create_task(self._watch_lost(), name="lost journals")
            while True:
                last = self._office.draining.is_set()
                for folder in await asyncio.to_thread(list_journals, self._root):
                    if folder.name not in self._figures.journals:
                        self._figures.journals[folder.name] = figures = JournalFigures()
                        tasks.create_task(self._follow(folder, figures), name=f"journal {folder.name}")
                if last:
                    break
                await self._office.pause(self._office.interval_s)
            lost.cancel()

    def drain(self) -> None:
        """Has `run` end as soon as everything is shipped. What is not by then stays where it is."""
        self._office.draining.set()

    async def status(self, now: float) -> ShipperStatus:
        """As of `now`, seconds since the epoch; looks at the journals. Raises `OSError`."""
        for journal_id, journal in list(self._figures.journals.items()):
            # It may be removed meanwhile.
            with contextlib.suppress(FileNotFoundError):
                journal.begin, journal.end = await asyncio.to_thread(measure, self._root / journal_id)
        failing_code = self._office.to_ledger.failing_code or self._office.to_closer.failing_code
        return self._figures.status(now, failing_code)

    async def _follow(self, folder: Path, figures: JournalFigures) -> None:
        """Ships one journal to its end, with a long pause after each failure."""
        try:
            while True:
                try:
                    await JournalShipping(folder, self._office, figures).run()
                    return
                except HelixError as exc:
                    figures.refused_code = exc.code
                    log.error("journal.refused", journal=folder.name, code=exc.code, reason=exc.message)
                except UserError as exc:
                    figures.refused_code = UNREADABLE
                    log.error("journal.unreadable", journal=folder.name, reason=exc.message)
                except FileNotFoundError:
                    # Somebody has removed it: that is for the look for lost ones.
                    return
                except OSError as exc:
                    figures.refused_code = UNREADABLE
                    log.error("journal.unreadable", journal=folder.name, reason=exc.strerror)
                if self._office.draining.is_set():
                    return
                await self._office.pause(RETRY_S)
                figures.refused_code = ""
        finally:
            self._ended.add(folder.name)
            del self._figures.journals[folder.name]

    async def _watch_lost(self) -> None:
        while True:
            try:
                await self._close_lost()
            except HelixError as exc:
                log.error("journals.unknown", code=exc.code, reason=exc.message)
            await asyncio.sleep(LOST_CHECK_S)

    async def _close_lost(self) -> None:
        """Journals of this node that the ledger waits for and whose folder is gone: the disk was wiped. And those of
        nodes that were given up by an administrator.

        A gateway makes its folder before it announces its journal. So one that is missing, seen after the ledger told
        of it, is gone; unless it was closed by us in between.
        """
        office = self._office
        self._ended.clear()
        view = await office.to_ledger.insist(partial(office.ledger.read, ()))
        here = {folder.name for folder in await asyncio.to_thread(list_journals, self._root)}
        nodes = (office.node_id, ABANDONED)
        ours = {journal_id for journal_id, journal in view.open_journals.items() if journal.node_id in nodes}
        for journal_id in sorted(ours - here - self._ended - self._figures.journals.keys()):
            try:
                await self._lose(journal_id, view.open_journals[journal_id].position)
            except HelixError as exc:
                log.error("journal.refused", journal=journal_id, code=exc.code, reason=exc.message)

    async def _lose(self, journal_id: str, position: int) -> None:
        """Closes a lost journal, which the ledger has up to `position`.

        What is known of calls that it had admitted gets rows, charged as reserved. Only a limiter that outlives
        gateways knows any: without one, what the journal held and had not shipped is in nobody's account. Nor is there
        a row for what was spent of leases, nor for calls that had ended and were not shipped.
        """
        office, closer = self._office, self._office.closer
        calls = [] if closer is None else await office.to_closer.insist(partial(closer.list_lost, journal_id))
        log.warning("journal.lost", journal=journal_id, calls=len(calls), known=closer is not None)
        # Where rows lie does not matter: the ledger knows those that it has by their calls.
        first = max(LOST_BASE, position) + 1
        rows = [(first + number, make_lost_row(call, journal_id)) for number, call in enumerate(calls)]
        if rows:
            for shipment in pack(journal_id, rows, rows[-1][0]):
                await office.ship(shipment)
        # The ledger last: as long as it is open there, it is found again.
        if closer is not None:
            await office.to_closer.insist(partial(closer.close_lost, journal_id))
        await office.ship(Shipment(journal_id, rows[-1][0] if rows else position, closes=True))
