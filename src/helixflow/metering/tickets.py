"""Admitted calls: each is journalled, and settled exactly once, however it ends."""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import Final, Protocol

from helixflow.core.call import Call, Meter, Progress, Ticket
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.principal import PrincipalKind
from helixflow.dialects.openai_chat import ChatParams
from helixflow.metering.admission import Demand, Grant, Limiter, Settlement
from helixflow.metering.demand import estimate_prompt
from helixflow.metering.journal.records import Admitted, Progressed, Settled, SideCharge, Tokens
from helixflow.metering.journal.writer import JournalWriter
from helixflow.metering.money import MAX_NANODOLLARS
from helixflow.metering.prices import Price

_DIALECT: Final = "openai"
_AUTHORISED_BY: Final = {PrincipalKind.KEY: "key", PrincipalKind.ACCOUNT: "token"}
_CANCELLED: Final = ErrorKind.CLIENT_CLOSED
_MAX_CODE: Final = 64


class Prices(Protocol):
    """What deployments charge."""

    @property
    def ready(self) -> bool:
        """Whether any prices are known yet."""
        ...

    def price(self, deployment: str, at_ms: int) -> Price: ...

    def dearest_bound(
        self, deployments: Sequence[str], at_ms: int, prompt_tokens: int, completion_tokens: int, engine_ms: int
    ) -> int:
        """Nanodollars that a call costs at most, whichever of them serves it."""
        ...


class Book:
    """The calls in flight, and where their ends are written."""

    def __init__(self, prices: Prices, limiter: Limiter, journal: JournalWriter) -> None:
        self.prices = prices
        self.limiter = limiter
        self.journal = journal
        self.tickets: dict[str, CallTicket] = {}
        self.settled_to = 0

    def admit(self, ticket: "CallTicket") -> None:
        """Writes it down: now it must be settled. Raises `HelixError` STORAGE_FULL, its grant given back."""
        call, demand = ticket.call, ticket.demand
        principal = call.principal
        params = call.params
        record = Admitted(
            demand.call_id,
            demand.admitted_at_ms,
            call.request_id,
            demand.organisation_id,
            demand.project_id,
            demand.key_id,
            principal.owner_id if demand.key_id else principal.id,
            call.model,
            _DIALECT,
            call.operation.value,
            call.stream,
            params.metadata if type(params) is ChatParams else None,
            ticket.grant.holds,
            _AUTHORISED_BY[principal.kind],
            demand.policies.ids,
            demand.tokens_bound,
            demand.cost_bound,
        )
        try:
            ticket.position = self.journal.admit(record)
        except HelixError:
            self.limiter.release((ticket.settlement(0, 0),))
            raise
        self.tickets[demand.call_id] = ticket

    def settle(self, ticket: "CallTicket", tokens: Tokens, cost: int, record: Settled) -> None:
        del self.tickets[record.call_id]
        try:
            ticket.position = self.settled_to = self.journal.settle(record)
        finally:
            self.limiter.settle(ticket.settlement(tokens.prompt + tokens.completion, cost))


class CallTicket(Ticket):
    """One admitted call: what it asked for and was granted. `started` is when it asked, by `time.perf_counter`."""

    __slots__ = (
        "_book",
        "_done",
        "_started",
        "_written",
        "call",
        "demand",
        "grant",
        "position",
        "requests",
        "tokens",
    )

    def __init__(self, book: Book, call: Call, demand: Demand, grant: Grant, started: float) -> None:
        self.call = call
        self.demand = demand
        self.grant = grant
        self.requests, self.tokens = grant.requests, grant.tokens
        self.position = 0
        self._book = book
        self._started = started
        self._written = 0
        self._done = False

    def settlement(self, tokens: int, cost: int) -> Settlement:
        demand = self.demand
        return Settlement(demand.call_id, demand.organisation_id, self.grant.holds, tokens, cost, self.position)

    def complete(self) -> Awaitable[None] | None:
        if self._done:
            return None
        self._end(200, "completed", "")
        return self.durable()

    def durable(self) -> Awaitable[None] | None:
        """None, or to be awaited until its last record is as safe as the settings want it; until its deadline."""
        wait = self._book.journal.durable(self.position)
        return None if wait is None else _until_durable(wait, self.demand.deadline)

    def fail(self, error: HelixError) -> None:
        if not self._done:
            self._end(error.traits.http, "failed", error.code[:_MAX_CODE])

    def cancel(self) -> None:
        if not self._done:
            self._end(499, "cancelled", _CANCELLED.value)

    def note_progress(self, now_ms: int) -> None:
        """Journals what it has used so far, if that has changed."""
        if self._done:
            return
        progress = self.call.progress
        used = progress.usage.prompt_tokens + progress.usage.completion_tokens
        if used == self._written:
            return
        self._written = used
        tokens = self._tokens(progress)
        engine_ms = self._engine_ms(progress, time.perf_counter())
        price = self._book.prices.price(progress.deployment, self.demand.admitted_at_ms)
        cost = price.rate(tokens, engine_ms)
        side: tuple[SideCharge, ...] = ()
        if progress.side_usage:
            side = self._side_charges(progress)
            cost += sum(charge.cost for charge in side)
        self._book.journal.progress(
            Progressed(
                self.call.call_id,
                now_ms,
                progress.deployment,
                tokens,
                min(cost, MAX_NANODOLLARS),
                price.version,
                self._since_start_ms(progress.first_content_at),
                engine_ms,
                side,
            )
        )

    def _end(self, status: int, outcome: str, error: str) -> None:
        self._done = True
        call, demand = self.call, self.demand
        progress = call.progress
        ended = time.perf_counter()
        tokens = self._tokens(progress, left=outcome == "cancelled")
        engine_ms = self._engine_ms(progress, ended)
        cost, version = 0, ""
        if tokens.prompt or tokens.completion:
            price = self._book.prices.price(progress.deployment, demand.admitted_at_ms)
            cost, version = price.rate(tokens, engine_ms), price.version
        side: tuple[SideCharge, ...] = ()
        if progress.side_usage:
            side = self._side_charges(progress)
            cost += sum(charge.cost for charge in side)
        if cost > MAX_NANODOLLARS:
            cost = MAX_NANODOLLARS
        record = Settled(
            demand.call_id,
            progress.deployment,
            status,
            outcome,
            error,
            tokens,
            cost,
            version,
            self._since_start_ms(progress.engine_began_at),
            self._since_start_ms(progress.first_content_at),
            int((ended - self._started) * 1000),
            engine_ms,
            progress.attempts,
            side,
        )
        self._book.settle(self, tokens, cost, record)
        # The call has the ticket, and would be kept until the next collection: its memory is wanted for the next one,
        # while it is in the processor's cache.
        del self.call

    def _tokens(self, progress: Progress, *, left: bool = False) -> Tokens:
        """`left`: the client gave up. From then on the engine may not have stopped at once, and has read the prompt."""
        usage = progress.usage
        prompt = usage.prompt_tokens
        was_read = progress.first_content_at is not None or (left and progress.engine_began_at is not None)
        if not prompt and was_read and not usage.reported:
            # It does not say how long the prompt was.
            prompt = estimate_prompt(self.call)
        return Tokens(prompt, usage.cached_tokens, usage.completion_tokens, usage.reasoning_tokens, usage.reported)

    def _side_charges(self, progress: Progress) -> tuple[SideCharge, ...]:
        """What other deployments charge for the call, each by its own price."""
        charges = []
        for side in progress.side_usage:
            usage, deployment = side.usage, side.deployment
            # It was given the prompt, whether or not it came to say how long that was.
            prompt = usage.prompt_tokens or estimate_prompt(self.call)
            tokens = Tokens(
                prompt, usage.cached_tokens, usage.completion_tokens, usage.reasoning_tokens, usage.reported
            )
            price = self._book.prices.price(deployment, self.demand.admitted_at_ms)
            cost = min(price.rate(tokens, side.engine_ms), MAX_NANODOLLARS)
            charges.append(SideCharge(deployment, tokens, side.engine_ms, cost, price.version))
        return tuple(charges)

    def _since_start_ms(self, moment: float | None) -> int:
        return -1 if moment is None else int((moment - self._started) * 1000)

    @staticmethod
    def _engine_ms(progress: Progress, now: float) -> int:
        began = progress.engine_began_at
        return -1 if began is None else int((now - began) * 1000)


async def _until_durable(wait: Awaitable[None], deadline: float) -> None:
    """Raises `HelixError`: UNAVAILABLE when the disk fails, DEADLINE when it hangs."""
    try:
        async with asyncio.timeout_at(deadline):
            await wait
    except TimeoutError as exc:
        raise HelixError(ErrorKind.DEADLINE, "The journal's disk did not answer in time.") from exc


class Refused(Ticket):
    """Of a call that was not admitted: only the states of the limits."""

    def __init__(self, requests: Meter | None, tokens: Meter | None) -> None:
        self.requests = requests
        self.tokens = tokens

    def complete(self) -> Awaitable[None] | None:
        return None

    def fail(self, error: HelixError) -> None:
        """Nothing was taken."""

    def cancel(self) -> None:
        """Nothing was taken."""
