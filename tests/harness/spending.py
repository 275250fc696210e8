"""Gateways that share limits and budgets, without the rest: a limiter, a journal in memory, a ledger in memory.

`Ledger` implements `SpendReader`. A `Spender` is one gateway: what it settles lies in its journal until `ship`.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from helixflow.core.clock import SystemClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.admission import Demand, Grant, Settlement
from helixflow.metering.policies import Policies, Unit
from helixflow.metering.redis.redis_limiter import RedisLimiter
from helixflow.metering.spend import BudgetPeriod, OpenJournal, SpendView
from helixflow.settings.tree import RedisSettings

ORGANISATION = "org_1"


class Ledger:
    """What has been shipped: money and tokens in all, whatever the budget, and how far each open journal is."""

    def __init__(self) -> None:
        self.positions: dict[str, int] = {}
        self.cost = 0
        self.tokens = 0
        self.is_down = False
        self.reads = 0

    async def read(self, periods: Sequence[BudgetPeriod]) -> SpendView:
        self.reads += 1
        if self.is_down:
            raise HelixError(ErrorKind.UNAVAILABLE, "The ledger does not answer. Try again.")
        spent = [self.cost if period.budget.unit is Unit.MONEY else self.tokens for period in periods]
        view = SpendView(spent, {name: OpenJournal("node", position) for name, position in self.positions.items()})
        await asyncio.sleep(0)
        return view


@dataclass
class Spender:
    """One gateway. `open_calls` are its granted calls, by id."""

    ledger: Ledger
    limiter: RedisLimiter
    journal_id: str
    position: int = 0
    unshipped: list[tuple[int, int, int]] = field(default_factory=list)
    open_calls: dict[str, Grant] = field(default_factory=dict)
    # All settlements that it journalled, as a shipper finds them.
    settlements: list[Settlement] = field(default_factory=list)
    cost: int = 0
    # Up to where Redis needs nothing of its journal.
    acknowledged: int = 0
    _task: asyncio.Task[None] | None = None

    @classmethod
    def create(cls, settings: RedisSettings, ledger: Ledger) -> Self:
        journal_id = secrets.token_hex(12)
        ledger.positions[journal_id] = 0
        spender: Self

        def position() -> int:
            return spender.position

        def acknowledge(position: int) -> None:
            spender.acknowledged = position

        limiter = RedisLimiter(
            settings, ledger, SystemClock(), journal_id=journal_id, position=position, acknowledge=acknowledge
        )
        spender = cls(ledger, limiter, journal_id)
        return spender

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.limiter.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def die(self) -> None:
        """As by kill -9: nothing is settled or said."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def admit(
        self, policies: Policies, *, tokens: int = 0, cost: int = 0, at_ms: int | None = None, wait_s: float = 10.0
    ) -> str:
        """The id of a call that was granted; `cost` and `tokens` bound it. Raises as the limiter does."""
        call_id = secrets.token_hex(16)
        now_ms = int(SystemClock().now() * 1000) if at_ms is None else at_ms
        deadline = asyncio.get_running_loop().time() + wait_s
        demand = Demand(call_id, ORGANISATION, policies, tokens, tokens, cost, now_ms, deadline)
        grant = self.limiter.try_admit(demand)
        if grant is None:
            grant = await self.limiter.admit(demand)
        self.position += 1
        self.open_calls[call_id] = grant
        return call_id

    def settle(self, call_id: str, *, tokens: int = 0, cost: int = 0) -> None:
        settlement = self._settlement(call_id, tokens, cost)
        self.unshipped.append((self.position, tokens, cost))
        self.settlements.append(settlement)
        self.cost += cost
        self.limiter.settle(settlement)

    def release(self, call_id: str) -> None:
        self.limiter.release((self._settlement(call_id, 0, 0),))

    def ship(self) -> None:
        """All of the journal, in one transaction."""
        for _, tokens, cost in self.unshipped:
            self.ledger.tokens += tokens
            self.ledger.cost += cost
        self.unshipped.clear()
        if self.journal_id in self.ledger.positions:
            self.ledger.positions[self.journal_id] = self.position

    async def ship_often(self, interval_s: float = 0.02) -> None:
        """Until cancelled, as the shipper does."""
        while True:
            self.ship()
            await asyncio.sleep(interval_s)

    def interrupt(self, cost: Callable[[str], int]) -> list[Settlement]:
        """What the shipper makes of the journal of a dead gateway: all its ends, open calls with what they had used."""
        for call_id in list(self.open_calls):
            settlement = self._settlement(call_id, 0, cost(call_id))
            self.unshipped.append((settlement.position, 0, settlement.cost))
            self.settlements.append(settlement)
            self.cost += settlement.cost
        return self.settlements

    def _settlement(self, call_id: str, tokens: int, cost: int) -> Settlement:
        grant = self.open_calls.pop(call_id)
        self.position += 1
        return Settlement(call_id, ORGANISATION, grant.holds, tokens, cost, self.position)
