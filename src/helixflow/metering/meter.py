"""Metered completion: a call is admitted, journalled and dispatched; however it ends, it is settled exactly once.

The order: limits and budgets, journal `admitted`, dispatch, journal `settled`, settlement of the counters. A process
that dies in between leaves a journal from which others finish the rest.
"""

import asyncio
import time
from collections import Counter
from typing import Final, Protocol

from helixflow.core.call import Call, Completer, Stream
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.principal import Principal, PrincipalKind
from helixflow.metering.admission import Demand, Limiter, Refusal
from helixflow.metering.demand import NO_BOUNDS, Estimator, plan_of
from helixflow.metering.journal.writer import JournalWriter
from helixflow.metering.policies import Policies
from helixflow.metering.refusals import refusal_error
from helixflow.metering.tickets import Book, CallTicket, Prices, Refused

_PROGRESS_BATCH: Final = 100
# At the start prices come a moment after the first callers; then something is wrong.
_PRICES_WAIT_S: Final = 2.0
_PRICES_LOOK_S: Final = 0.02


class PolicySource(Protocol):
    """Which limits and budgets a principal's calls must fit."""

    def cached(self, principal: Principal, model: str) -> Policies | None:
        """What is known and fresh; never waits."""
        ...

    async def resolve(self, principal: Principal, model: str) -> Policies:
        """Raises `HelixError` UNAVAILABLE when it cannot be known."""
        ...


class Metered:
    """Implements `Completer` around another one. `run` it for as long as it serves."""

    def __init__(
        self,
        inner: Completer,
        *,
        estimator: Estimator,
        policies: PolicySource,
        prices: Prices,
        limiter: Limiter,
        journal: JournalWriter,
        progress_interval_s: float,
        clock: Clock,
    ) -> None:
        self._inner = inner
        self._estimator = estimator
        self._policies = policies
        self._limiter = limiter
        self._progress_interval_s = progress_interval_s
        self._now = clock.now
        self._loop: asyncio.AbstractEventLoop | None = None
        self._book = Book(prices, limiter, journal)
        # Refused calls by the metric or unit that refused them.
        self.refused: Counter[str] = Counter()

    @property
    def in_flight(self) -> int:
        """Calls that are admitted and not settled."""
        return len(self._book.tickets)

    @property
    def settled_to(self) -> int:
        """The position in the journal before which all that has been settled lies; 0 while nothing has."""
        return self._book.settled_to

    async def open(self, call: Call) -> Stream:
        """As the completer within. Raises `HelixError` before that: RATE_LIMITED, INSUFFICIENT_QUOTA, UNAVAILABLE
        while nobody can say what holds, STORAGE_FULL.

        `call.ticket` is set as soon as it is known, of refused calls too. Whoever reads the stream of a streamed call
        ends its ticket; other calls have ended when this returns.
        """
        policies = self._policies.cached(call.principal, call.model)
        if policies is None:
            policies = await self._policies.resolve(call.principal, call.model)
        if not self._book.prices.ready:
            await self._until_priced(call.deadline)
        started = time.perf_counter()
        demand = self._demand(call, policies)
        try:
            grant = self._limiter.try_admit(demand)
            if grant is None:
                grant = await self._limiter.admit(demand)
        except Refusal as refusal:
            raise self._refuse(call, refusal) from None
        ticket = CallTicket(self._book, call, demand, grant, started)
        self._book.admit(ticket)
        call.ticket = ticket
        try:
            if (wait := ticket.durable()) is not None:
                await wait
            stream = await self._inner.open(call)
        except HelixError as exc:
            ticket.fail(exc)
            raise
        except Exception:
            ticket.fail(HelixError(ErrorKind.INTERNAL, "The call failed."))
            raise
        except BaseException:
            ticket.cancel()
            raise
        if not call.stream and (wait := ticket.complete()) is not None:
            await wait
        return stream

    async def run(self) -> None:
        """Journals the progress of long calls, until cancelled."""
        while True:
            await asyncio.sleep(self._progress_interval_s)
            now = self._now()
            for number, ticket in enumerate(list(self._book.tickets.values())):
                # Thousands of streams at once would hold up all their tokens.
                if number % _PROGRESS_BATCH == _PROGRESS_BATCH - 1:
                    await asyncio.sleep(0)
                ticket.note_progress(int(now * 1000))

    async def _until_priced(self, deadline: float) -> None:
        """Raises `HelixError` UNAVAILABLE: what cannot be rated is not made."""
        loop = asyncio.get_running_loop()
        deadline = min(deadline, loop.time() + _PRICES_WAIT_S)
        while not self._book.prices.ready:
            if loop.time() >= deadline:
                message = "Prices are not known yet: the auth service has not answered. Try again."
                raise HelixError(ErrorKind.UNAVAILABLE, message, retry_after_s=1)
            await asyncio.sleep(_PRICES_LOOK_S)

    def _demand(self, call: Call, policies: Policies) -> Demand:
        """What the call asks for."""
        principal = call.principal
        admitted_at_ms = int(self._now() * 1000)
        bounds = self._estimator.bounds(call) if policies.ids else NO_BOUNDS
        cost_bound = 0
        if policies.have_money:
            if self._loop is None:  # asked for once: each asking is a system call (getpid)
                self._loop = asyncio.get_running_loop()
            left_s = call.deadline - self._loop.time()
            plan = plan_of(call)
            # Tokens are counted of the attempt that answers; money is spent for all.
            cost_bound = plan.attempts * self._book.prices.dearest_bound(
                plan.deployments, admitted_at_ms, bounds.prompt, bounds.completion, int(left_s * 1000)
            )
        return Demand(
            call.call_id,
            principal.organisation_id,
            policies,
            bounds.expected,
            bounds.prompt + bounds.completion,
            cost_bound,
            admitted_at_ms,
            call.deadline,
            principal.project_id,
            principal.id if principal.kind is PrincipalKind.KEY else "",
        )

    def _refuse(self, call: Call, refusal: Refusal) -> HelixError:
        """Counts it, and leaves the limits' states in the call's ticket."""
        call.ticket = Refused(refusal.requests, refusal.tokens)
        self.refused[_name_of(refusal)] += 1
        return refusal_error(refusal)


def _name_of(refusal: Refusal) -> str:
    if refusal.limit is not None:
        return refusal.limit.metric.name.lower()
    assert refusal.budget is not None
    return f"budget_{refusal.budget.unit.name.lower()}"
