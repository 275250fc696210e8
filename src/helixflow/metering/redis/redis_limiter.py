"""Limits and budgets that several gateways share: counted in Redis, exactly, in one round trip a call."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.admission import Demand, Grant, Settlement
from helixflow.metering.redis.acknowledging import Acknowledgement
from helixflow.metering.redis.calls import NEVER_WAS, Ended, OpenCall, Outbox, Whereabouts
from helixflow.metering.redis.connection import Answer
from helixflow.metering.redis.fallback import Fallback
from helixflow.metering.redis.leases import Leases
from helixflow.metering.redis.link import RedisLink
from helixflow.metering.redis.loading import BudgetLoader
from helixflow.metering.redis.membership import Membership, Presence, Session
from helixflow.metering.redis.plan import Plan, Plans, whose
from helixflow.metering.redis.resp import Reply, encode_arguments
from helixflow.metering.redis.restoring import Restoration
from helixflow.metering.spend import SpendReader
from helixflow.settings.tree import RedisSettings

# How long a call waits to learn what a budget has left, if its deadline is not sooner.
LOAD_TIMEOUT_S: Final = 5.0
_GRANTED: Final = 0

_NOTHING: Final = Grant()
_ENCODE: Final = msgspec.msgpack.Encoder().encode
_ANSWER: Final = msgspec.msgpack.Decoder(list[int])


class RedisFigures(Struct, frozen=True):
    """For metrics. `away`: 1 while the server cannot be asked. `fallbacks` are calls that were decided without it,
    `outages` how often it was lost, `joins` how often we have joined; `unknown` are calls refused since nobody could
    say what a budget has left, `failures` questions that the ledger did not answer; `unsent` ends of calls that it has
    not acknowledged."""

    away: int
    in_flight: int
    fallbacks: int
    outages: int
    joins: int
    leases: int
    loading: int
    unknown: int
    failures: int
    unsent: int


class RedisLimiter:
    """Implements `Limiter`. To be run for as long as it decides.

    While the server is away each gateway enforces its share of limits, and budgets from what it has leased: once that
    is used up they refuse. A budget that is made while calls run does not count those: only what is admitted when it
    exists, and what the ledger has of others.

    `position` is where our journal ends now: everything before has been journalled when it is asked. `acknowledge` is
    told, a few times a second at most, before which position Redis needs nothing of it any more; it may raise
    `OSError`. Until it was told so nothing must be cut.
    """

    def __init__(
        self,
        settings: RedisSettings,
        spend: SpendReader,
        clock: Clock,
        *,
        journal_id: str,
        position: Callable[[], int],
        acknowledge: Callable[[int], None],
    ) -> None:
        self._clock = clock
        self._journal_id = journal_id.encode()
        self._timeout_s = float(settings.timeout_s)
        self._link = RedisLink(settings, f"helixflow-{journal_id[:8]}")
        self._plans = Plans()
        self._calls: dict[str, OpenCall] = {}
        self._outbox = Outbox()
        self._leases = Leases(settings.lease_per_mille)
        self._fallback = Fallback(settings.gateways, self._leases, self._calls.values)
        self._restoration = Restoration(self._calls, self._outbox, self._leases, self._fallback, position)
        self._membership = Membership(self._link, journal_id, self._restoration, self._leases, self._take_back)
        self._acknowledgement = Acknowledgement(
            self._membership, self._restoration, self._outbox, position, acknowledge
        )
        self._loader = BudgetLoader(spend, self._membership)
        # Calls that are being asked for.
        self._asking: dict[Answer, str] = {}
        self._fallbacks = self._unknown = 0

    @property
    def figures(self) -> RedisFigures:
        membership = self._membership
        return RedisFigures(
            away=int(membership.presence is Presence.AWAY),
            in_flight=len(self._calls),
            fallbacks=self._fallbacks,
            outages=membership.outages,
            joins=membership.joins,
            leases=self._leases.held,
            loading=len(self._loader),
            unknown=self._unknown,
            failures=self._loader.failures,
            unsent=len(self._outbox),
        )

    def try_admit(self, demand: Demand) -> Grant | None:
        return None if demand.policies else _NOTHING

    async def admit(self, demand: Demand) -> Grant:
        if not demand.policies:
            return _NOTHING
        plan = self._plans.find(demand.policies, demand.admitted_at_ms)
        membership = self._membership
        while True:
            session = membership.session
            if session is None:
                if membership.presence is Presence.JOINING:
                    now = asyncio.get_running_loop().time()
                    await membership.settled(min(now + self._timeout_s, demand.deadline))
                    if membership.session is not None:
                        continue
                return self._admit_alone(plan, demand)
            answer = await self._ask(session, plan, demand)
            if answer is None:
                continue
            match answer[0]:
                case 0:  # granted
                    self._calls[demand.call_id] = OpenCall(
                        plan,
                        demand.tokens,
                        demand.tokens_bound,
                        demand.cost_bound,
                        whose(demand),
                        Whereabouts.REDIS,
                    )
                    if plan.budgets:
                        self._leases.note(plan)
                        for place, left in plan.leases_left(answer):
                            self._leases.lower(place, left)
                    return plan.grant(demand, answer)
                case 1:  # refused
                    raise plan.refusal(demand, answer, self._clock.now())
                case 2:  # budgets are not known
                    await self._load(plan, demand, answer[1:])
                case _:  # we are not known
                    membership.leave(session)

    def settle(self, settlement: Settlement) -> None:
        self._end(settlement.call_id, settlement.tokens, settlement.cost, settlement.position)

    def release(self, settlements: Sequence[Settlement]) -> None:
        for settlement in settlements:
            self._end(settlement.call_id, NEVER_WAS, 0, settlement.position)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._membership.run())
            tasks.create_task(self._loader.run())
            tasks.create_task(self._acknowledgement.run())

    async def close(self) -> None:
        """Waits until Redis has acknowledged all ends: for at most `redis.timeout_s`, and not while it is away.

        To be called while `run` goes on: without it nothing is sent, and this returns at once. What is then
        unacknowledged Redis learns from who closes our journal.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        membership = self._membership
        while asyncio.get_running_loop().time() < deadline:
            if membership.presence is Presence.JOINING:
                await membership.settled(deadline)
            if membership.session is None:
                return
            self._flush()
            answers = self._outbox.under_way()
            if answers:
                left_s = deadline - asyncio.get_running_loop().time()
                await asyncio.wait(answers, timeout=left_s)
            elif self._acknowledgement.is_whole:
                return
            else:
                await membership.changed(deadline)

    async def _ask(self, session: Session, plan: Plan, demand: Demand) -> Sequence[int] | None:
        """The script's answer; None: ask again, of whoever is there then."""
        connection = session.connection
        if connection.is_full:
            message = "More calls wait for leave than can be asked for. Try again."
            raise HelixError(ErrorKind.OVERLOADED, message, retry_after_s=1)
        # What has ended makes room for what asks after it.
        self._outbox.send(self._send)
        reservation = plan.reservation(
            session.epoch, demand.tokens, demand.tokens_bound, demand.cost_bound, whose(demand)
        )
        answer = session.admit(demand.call_id, reservation)
        self._asking[answer] = demand.call_id
        try:
            reply = await answer
        except asyncio.CancelledError:
            # The answer may still come, to `_take_back`, or has come just now.
            if not answer.cancelled():
                self._take_back(answer, answer.result())
            raise
        del self._asking[answer]
        # When we have joined again meanwhile, Redis has been told of all calls but this one, and released it.
        if not isinstance(reply, bytes) or self._membership.session is not session:
            return None
        return _ANSWER.decode(reply)

    def _admit_alone(self, plan: Plan, demand: Demand) -> Grant:
        now = asyncio.get_running_loop().time()
        self._fallbacks += 1
        grant, call = self._fallback.admit(plan, demand, now, self._restoration.generation)
        self._calls[demand.call_id] = call
        return grant

    async def _load(self, plan: Plan, demand: Demand, unknown: Sequence[int]) -> None:
        """Returns when it is worth asking again."""
        now = asyncio.get_running_loop().time()
        deadline = min(now + LOAD_TIMEOUT_S, demand.deadline)
        try:
            await self._loader.load([plan.budgets[number] for number in unknown], deadline)
        except TimeoutError as exc:
            self._unknown += 1
            message = "What is left of a budget cannot be told now: the ledger has not answered. Try again."
            raise HelixError(ErrorKind.UNAVAILABLE, message, retry_after_s=1) from exc

    def _end(self, call_id: str, tokens: int, cost: int, position: int) -> None:
        call = self._calls.pop(call_id, None)
        if call is None:
            return
        if self._membership.session is None:
            self._fallback.end(call, asyncio.get_running_loop().time(), tokens)
            if call.whereabouts == Whereabouts.HERE:
                self._leases.end(call, tokens, cost)
                return
        self._post(Ended(call_id, tokens, cost, position, call))

    def _post(self, ended: Ended) -> None:
        if self._outbox.add(ended):
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        if self._membership.session is not None:
            self._outbox.send(self._send)

    def _send(self, words: list[tuple[str, int, int, int]]) -> Answer:
        session = self._membership.session
        assert session is not None
        tail = encode_arguments(b"1", session.journal, self._journal_id, _ENCODE(words))
        return session.connection.evaluate(self._link.scripts.settle, tail)

    def _take_back(self, answer: Answer, reply: Reply) -> None:
        """Nobody waits for it any more."""
        call_id = self._asking.pop(answer, None)
        if call_id is not None and isinstance(reply, bytes) and _ANSWER.decode(reply)[0] == _GRANTED:
            self._post(Ended(call_id, NEVER_WAS, 0, 0))
