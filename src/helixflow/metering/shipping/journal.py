"""The way of one journal to the ledger, from its first record to the removal of its folder."""

import asyncio
import time
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from helixflow.metering.admission import Settlement
from helixflow.metering.journal.acknowledged import read_acknowledged
from helixflow.metering.journal.folders import Ownership, take_over
from helixflow.metering.ledger_client import LedgerClient
from helixflow.metering.shipping.closing import JournalCloser
from helixflow.metering.shipping.delivery import Delivery
from helixflow.metering.shipping.figures import Figures, JournalFigures
from helixflow.metering.shipping.shipments import Shipment
from helixflow.metering.shipping.source import Batch, JournalSource

# How long after the end of its time a call may still be settled.
EXPIRY_MARGIN_S: Final = 60.0

log = structlog.get_logger("helixflow.shipper")


class Office:
    """What the shipping of all journals of a node has in common.

    With a `closer`, gateways' holds outlive them: nothing is then cut from a journal before its gateway has said that
    they are settled (`metering.journal.acknowledged`).
    """

    def __init__(
        self,
        node_id: str,
        ledger: LedgerClient,
        closer: JournalCloser | None,
        quarantine: Path,
        interval_s: float,
        request_timeout_s: float,
    ) -> None:
        self.node_id = node_id
        self.ledger = ledger
        self.closer = closer
        self.quarantine = quarantine
        self.interval_s = interval_s
        # No call lasts longer.
        self.expiry_ms = int((request_timeout_s + EXPIRY_MARGIN_S) * 1000)
        self.to_ledger = Delivery("ledger")
        self.to_closer = Delivery("limiter")
        self.figures = Figures()
        # Set: ship what is there, at once, and end.
        self.draining = asyncio.Event()

    async def ship(self, shipment: Shipment) -> int:
        """The position that the ledger then has. Waits as long as it takes; raises `HelixError` when refused."""
        position = await self.to_ledger.insist(partial(self.ledger.ship, self.node_id, shipment))
        self.figures.shipped_rows += shipment.count
        return position

    async def pause(self, seconds: float) -> None:
        """Cut short by draining."""
        try:
            async with asyncio.timeout(seconds):
                await self.draining.wait()
        except TimeoutError:
            return


class JournalShipping:
    """Ships one journal while its gateway lives, and closes it once that has ended.

    Everything may be cut off anywhere and begun anew: the ledger passes over what it has, rows have the same positions
    each time, and the folder goes last.
    """

    def __init__(self, folder: Path, office: Office, figures: JournalFigures) -> None:
        self._folder = folder
        self._office = office
        self._figures = figures
        self._shipped = 0
        self._needed_from = 0
        self._cut_to = 0

    async def run(self) -> None:
        """Returns once the folder is removed; while draining, once all that is there has been shipped.

        Raises `HelixError` when the ledger refuses something; that, `UserError` or `OSError` when the journal cannot be
        read (`FileNotFoundError`: it is gone).
        """
        self._figures.waiting_since = time.time()
        self._figures.acknowledged = self._shipped = await self._office.ship(Shipment(self._folder.name, 0))
        self._figures.waiting_since = None
        source = await asyncio.to_thread(self._open, ended=False)
        while True:
            last = self._office.draining.is_set()
            ownership = await asyncio.to_thread(take_over, self._folder)
            if ownership is not None:
                await self._close(ownership)
                return
            batch = await asyncio.to_thread(source.read)
            if batch is None:
                await asyncio.to_thread(self._folder.stat)
            else:
                await self._deliver(batch)
                self._needed_from = batch.needed_from
            await self._cut(source)
            if batch is None or not batch.is_full:
                if last:
                    return
                await self._office.pause(self._office.interval_s)

    def _open(self, *, ended: bool) -> JournalSource:
        return JournalSource(
            self._folder,
            self._office.quarantine,
            shipped=self._shipped,
            ended=ended,
            keep_settlements=ended and self._office.closer is not None,
            expiry_ms=self._office.expiry_ms,
        )

    async def _close(self, ownership: Ownership) -> None:
        """Reads all of it again, from the oldest record that is there: what a dead gateway held may be in any."""
        journal_id, closer = self._folder.name, self._office.closer
        kept: list[Settlement] = []
        try:
            source = await asyncio.to_thread(self._open, ended=True)
            while (batch := await asyncio.to_thread(source.read)) is not None:
                await self._deliver(batch)
                kept += await self._settle(batch)
            rest = await asyncio.to_thread(source.finish)
            await self._deliver(rest)
            if closer is not None:
                kept += await self._settle(rest)
                await self._office.to_closer.insist(partial(closer.close, journal_id, kept))
        except BaseException:
            ownership.release()
            raise
        log.info("journal.closed", journal=journal_id, interrupted=rest.interrupted)
        await asyncio.to_thread(ownership.remove)

    async def _deliver(self, batch: Batch) -> None:
        own, all_journals = self._figures, self._office.figures
        all_journals.read_records += batch.records
        all_journals.read_bytes += batch.bytes
        all_journals.orphaned += batch.orphaned
        all_journals.interrupted += batch.interrupted
        if not batch.shipments:
            return
        own.waiting_since = batch.since
        for shipment in batch.shipments:
            own.acknowledged = self._shipped = await self._office.ship(shipment)
            all_journals.quarantined += shipment.quarantined
        own.waiting_since = None

    async def _settle(self, batch: Batch) -> list[Settlement]:
        """Those that are settled last."""
        closer = self._office.closer
        if closer is None or not batch.settlements:
            return []
        return await self._office.to_closer.insist(partial(closer.settle, self._folder.name, batch.settlements))

    async def _cut(self, source: JournalSource) -> None:
        """Nothing that the ledger has not, that calls in flight need, or that limits and budgets may not know of."""
        position = min(self._shipped, self._needed_from)
        if self._office.closer is not None and position > self._cut_to:
            position = min(position, await asyncio.to_thread(read_acknowledged, self._folder))
        if position > self._cut_to:
            self._cut_to = position
            await asyncio.to_thread(source.cut, position)
