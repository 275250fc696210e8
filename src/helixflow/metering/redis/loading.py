"""Budgets that Redis does not know yet: their sums are asked of the ledger and put there."""

import asyncio
from collections.abc import Sequence
from itertools import islice
from typing import Final

import msgspec
import structlog
from msgspec import Struct

from helixflow.core.errors import HelixError
from helixflow.metering.redis.keys import EPOCH, epoch_key
from helixflow.metering.redis.membership import Membership, Session
from helixflow.metering.redis.plan import PlannedBudget
from helixflow.metering.redis.resp import encode_arguments
from helixflow.metering.spend import SpendReader

# The ledger is asked again while its answer is not whole yet; less and less often while there is none.
RETRY_S: Final = 0.05
MAX_RETRY_S: Final = 1.0
_MAX_QUESTIONS: Final = 500

_ENCODE: Final = msgspec.msgpack.Encoder().encode
_UNKNOWN: Final = msgspec.msgpack.Decoder(list[int])

log = structlog.get_logger("helixflow.metering")


class _Load(Struct, eq=False):
    """A budget that calls wait for."""

    kept: PlannedBudget
    done: asyncio.Event
    waiting: int = 0


class BudgetLoader:
    """Asks the ledger, for budgets and for the open journals of a new epoch. To be run.

    A budget that is made while calls run counts those that are admitted once it is known, and what the ledger had then.
    """

    def __init__(self, spend: SpendReader, membership: Membership) -> None:
        self._spend = spend
        self._membership = membership
        self._loads: dict[str, _Load] = {}
        self._failing = False
        self.failures = 0

    def __len__(self) -> int:
        return len(self._loads)

    async def load(self, budgets: Sequence[PlannedBudget], deadline: float) -> None:
        """Returns once they have been loaded, or may have been; raises `TimeoutError` at the deadline."""
        async with asyncio.timeout_at(deadline):
            for kept in budgets:
                load = self._loads.get(kept.place)
                if load is None:
                    load = self._loads[kept.place] = _Load(kept, asyncio.Event())
                    self._membership.reads.set()
                load.waiting += 1
                try:
                    await load.done.wait()
                finally:
                    load.waiting -= 1

    async def run(self) -> None:
        """Until cancelled."""
        retry_s = RETRY_S
        while True:
            if not self._loads:
                await self._membership.reads.wait()
            session = self._membership.session
            asked = self._membership.reads.is_set()
            self._membership.reads.clear()
            self._forget_unwanted()
            if session is not None and (asked or session.ready):
                try:
                    await self._work(session)
                except HelixError as exc:
                    self._note_failure(exc)
                    retry_s = min(retry_s * 2, MAX_RETRY_S)
                else:
                    self._failing = False
                    retry_s = RETRY_S
            await asyncio.sleep(retry_s)

    async def _work(self, session: Session) -> None:
        if not session.ready:
            view = await self._spend.read(())
            await self._expect(session, list(view.open_journals))
            if not session.ready:
                return
        batch = list(islice(self._loads.values(), _MAX_QUESTIONS))
        if not batch:
            return
        view = await self._spend.read([load.kept.period for load in batch])
        open_journals = {journal_id: journal.position for journal_id, journal in view.open_journals.items()}
        budgets = [
            (epoch_key(session.epoch, load.kept.place), spent, load.kept.forget_at_ms)
            for load, spent in zip(batch, view.spent, strict=True)
        ]
        tail = encode_arguments(b"1", EPOCH.encode(), session.epoch.encode(), _ENCODE(budgets), _ENCODE(open_journals))
        reply = await session.connection.evaluate(session.link.scripts.load, tail)
        if not isinstance(reply, bytes):
            return
        unknown = frozenset(_UNKNOWN.decode(reply))
        for number, load in enumerate(batch):
            place = load.kept.place
            if number not in unknown:
                load.done.set()
                self._loads.pop(place, None)
            elif place in self._loads:
                # Last in the queue, for others to have their turn.
                self._loads[place] = self._loads.pop(place)

    async def _expect(self, session: Session, journals: Sequence[str]) -> None:
        tail = encode_arguments(b"1", EPOCH.encode(), session.epoch.encode(), _ENCODE(journals))
        reply = await session.connection.evaluate(session.link.scripts.expect, tail)
        session.ready = reply == b"ready"

    def _forget_unwanted(self) -> None:
        """Those whose calls have all given up."""
        for place, load in list(self._loads.items()):
            if not load.waiting:
                del self._loads[place]

    def _note_failure(self, error: HelixError) -> None:
        self.failures += 1
        if not self._failing:
            self._failing = True
            log.warning("budgets.unknown", reason=error.code, detail=error.message, budgets=len(self._loads))
