"""Thresholds of budgets: told once a period, soon after the ledger has what reached them.

Several control processes may watch one database: what one has recorded, the others do not.
"""

import asyncio
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
from sqlalchemy import Row, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.budget_spend import Bounds, format_amount, period_of, read_spent
from helixflow.core.clock import Clock
from helixflow.core.errors import HelixError
from helixflow.metering.policies import Unit as BudgetUnit
from helixflow.storage.engine import Database
from helixflow.storage.schema import budget_events, budgets

LOOK_EVERY_S: Final = 2.0
# What was admitted before midnight may be in the ledger only after it.
_LATE_S: Final = 600
# A month, with what is late of it.
_LONGEST_PERIOD_S: Final = 32 * 86_400
# Organisations looked at in one go; budgets that are in one question to the ledger.
_BATCH: Final = 100
# Clocks of control processes differ.
_LEEWAY_S: Final = 10

log = structlog.get_logger("helixflow.auth")


@dataclass(frozen=True, slots=True)
class Reached:
    """`threshold` per cent of the cap are spent, in the period that begins at `start` (seconds, 0: without end)."""

    budget: Row[Any]
    start: int
    threshold: int
    spent: int


class BudgetThresholds:
    """Raises events: rows of `budget_events`, and a line in the log each.

    The ledger says with `note_spend` who has spent something. New and changed budgets are found by looking, and at the
    start all of them. `raised` counts events by threshold, since the start of this process.
    """

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._spending: set[str] = set()
        # Since when budgets may have changed unseen: at first, since ever.
        self._looked_at = 0
        self._failing = False
        self.raised: dict[int, int] = {}

    def note_spend(self, organisation_ids: Iterable[str]) -> None:
        """These organisations have new rows in the ledger, which are committed. Never waits."""
        self._spending.update(organisation_ids)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.look()
            except HelixError as exc:
                if not self._failing:
                    log.warning("budget.thresholds_failed", code=exc.code, reason=exc.message)
                self._failing = True
            else:
                self._failing = False
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Raises the events that are due. Raises `HelixError` when the database cannot be used; nothing is lost."""
        now = int(self._clock.now())
        spending, self._spending = self._spending, set()
        try:
            spending |= await self._with_changed_budgets()
            waiting = sorted(spending)
            for at in range(0, len(waiting), _BATCH):
                await self._look_at(waiting[at : at + _BATCH], now)
        except BaseException:
            self._spending |= spending
            raise
        self._looked_at = now - _LEEWAY_S

    async def _with_changed_budgets(self) -> set[str]:
        query = select(budgets.c.organisation_id).where(budgets.c.updated_at >= self._looked_at).distinct()
        return {row.organisation_id for row in await self._database.fetch_all(query)}

    async def _look_at(self, organisation_ids: Sequence[str], now: int) -> None:
        async with self._database.reading() as connection:
            found = await _read_budgets(connection, organisation_ids)
            recorded = await _read_recorded(connection, organisation_ids, now)
            periods = [
                (row, bounds) for row in found for bounds in _open_periods(row, now) if _missing(row, bounds, recorded)
            ]
            spent = await read_spent(connection, periods)
        reached = [
            Reached(row, bounds[0] // 1000, threshold, amount)
            for (row, bounds), amount in zip(periods, spent, strict=True)
            for threshold in _missing(row, bounds, recorded)
            if amount * 100 >= threshold * row.cap
        ]
        if reached:
            await self._record(organisation_ids, reached, now)

    async def _record(self, organisation_ids: Sequence[str], reached: Sequence[Reached], now: int) -> None:
        async with self._database.writing() as connection:
            # Another process may have been quicker: from here on nobody is.
            recorded = await _read_recorded(connection, organisation_ids, now)
            new = [
                event for event in reached if event.threshold not in recorded.get((event.budget.id, event.start), ())
            ]
            if new:
                await connection.execute(insert(budget_events), [_values(event, now) for event in new])
        for event in new:
            self.raised[event.threshold] = self.raised.get(event.threshold, 0) + 1
            unit = BudgetUnit(event.budget.unit)
            log.warning(
                "budget.threshold",
                budget_id=event.budget.id,
                organisation_id=event.budget.organisation_id,
                threshold=event.threshold,
                spent=format_amount(event.spent, unit),
                cap=format_amount(event.budget.cap, unit),
                unit=unit.name.lower(),
            )


_Recorded = Mapping[tuple[str, int], set[int]]


async def _read_budgets(connection: AsyncConnection, organisation_ids: Sequence[str]) -> Sequence[Row[Any]]:
    query = select(budgets).where(budgets.c.organisation_id.in_(organisation_ids)).order_by(budgets.c.id)
    return (await connection.execute(query)).all()


async def _read_recorded(connection: AsyncConnection, organisation_ids: Sequence[str], now: int) -> _Recorded:
    """The thresholds that were told already, by budget and start of the period; of periods that may go on."""
    events = budget_events.c
    query = (
        select(events.budget_id, events.period_start, events.threshold)
        .join(budgets, budgets.c.id == events.budget_id)
        .where(
            budgets.c.organisation_id.in_(organisation_ids),
            or_(events.period_start == 0, events.period_start >= now - _LONGEST_PERIOD_S),
        )
    )
    recorded: dict[tuple[str, int], set[int]] = {}
    for row in await connection.execute(query):
        recorded.setdefault((row.budget_id, row.period_start), set()).add(row.threshold)
    return recorded


def _open_periods(row: Row[Any], now: int) -> list[Bounds]:
    """The current period, and shortly after its start the one before, if the budget was there by then."""
    moments = (now, max(now - _LATE_S, row.created_at))
    return list(dict.fromkeys(period_of(row, moment) for moment in moments))


def _missing(row: Row[Any], bounds: Bounds, recorded: _Recorded) -> list[int]:
    told = recorded.get((row.id, bounds[0] // 1000), ())
    return [threshold for threshold in row.thresholds if threshold not in told]


def _values(event: Reached, now: int) -> dict[str, Any]:
    budget = event.budget
    return {
        "id": f"event_{secrets.token_hex(12)}",
        "organisation_id": budget.organisation_id,
        "budget_id": budget.id,
        "period_start": event.start,
        "threshold": event.threshold,
        "spent": event.spent,
        "cap": budget.cap,
        "unit": budget.unit,
        "at": now,
    }
