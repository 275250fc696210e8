"""How a gateway takes part: it connects, says hello, joins with what it knows, and asks now and then whether all is
as it was.

An epoch is the time for which Redis has forgotten nothing. It ends when Redis starts again, is emptied or replaced:
then the first gateway to say hello begins a new one, in which no budget is known. It is "new" until somebody has asked
the ledger which journals are open, "rebuilding" until all of those have joined (or the ledger says that they are
closed), then "ready": budgets may be loaded. A budget's sum is taken from the ledger only when it has each journal up
to where that was when it joined, so what has ended before is in the sum, and what was open then is reserved here.

A generation is one connection's time. Its number is in the hash of our reservations; what an older connection still
has under way finds another one there and does nothing.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from enum import Enum
from typing import Final, Protocol

import msgspec
import structlog
from msgspec import Struct

from helixflow.metering.redis.connection import Answer, RedisConnection
from helixflow.metering.redis.keys import EPOCH, journal_key
from helixflow.metering.redis.leases import Leases
from helixflow.metering.redis.link import RedisLink, RedisUnavailable
from helixflow.metering.redis.plan import Reservation
from helixflow.metering.redis.resp import Reply, encode_arguments
from helixflow.metering.redis.sweeping import Sweeper
from helixflow.process.backoff import Backoff

POLL_S: Final = 0.2
_READER_MS: Final = 2_500
_READY: Final = "ready"

_ENCODE: Final = msgspec.msgpack.Encoder().encode
_HELLO: Final = msgspec.msgpack.Decoder(tuple[str, str, int])
_JOINED: Final = msgspec.msgpack.Decoder(list[str])
_POLLED: Final = msgspec.msgpack.Decoder(list[str | int])

log = structlog.get_logger("helixflow.metering")


class Presence(Enum):
    """Where we stand: JOINING, a moment later it will be one of the others."""

    JOINING = "joining"
    JOINED = "joined"
    AWAY = "away"


class Luggage(Struct):
    """What a gateway brings when it joins, encoded for the script, and where its journal ends."""

    payload: bytes
    position: int


class Traveller(Protocol):
    """Whose calls they are."""

    def pack(self, epoch: str, generation: int, before: int) -> Luggage:
        """What to bring. `before` is the generation that Redis knows of us in this epoch; -1: it has forgotten all."""
        ...

    def arrived(self) -> None:
        """Redis has all that was packed last."""
        ...


class Session:
    """A connection on which we have joined; `ready`: budgets may be loaded."""

    __slots__ = ("_admit_head", "connection", "epoch", "generation", "journal", "link", "ready")

    def __init__(
        self, connection: RedisConnection, link: RedisLink, epoch: str, journal_id: str, generation: int
    ) -> None:
        self.connection = connection
        self.link = link
        self.epoch = epoch
        self.generation = generation
        self.journal = journal_key(epoch, journal_id).encode()
        self.ready = False
        self._admit_head = encode_arguments(b"1", self.journal, b"%d" % generation)

    def admit(self, call_id: str, asked: Reservation) -> Answer:
        call, reservation = call_id.encode(), _ENCODE(asked)
        tail = b"%b$%d\r\n%b\r\n$%d\r\n%b\r\n" % (self._admit_head, len(call), call, len(reservation), reservation)
        return self.connection.evaluate(self.link.scripts.admit, tail)


class Membership:
    """Keeps this gateway joined. `session` is None while it is not; whoever finds it of no use says `leave`."""

    def __init__(
        self,
        link: RedisLink,
        journal_id: str,
        traveller: Traveller,
        leases: Leases,
        unclaimed: Callable[[Answer, Reply], None],
    ) -> None:
        self._link = link
        self._journal_id = journal_id
        self._traveller = traveller
        self._leases = leases
        self._unclaimed = unclaimed
        self._generation = 0
        self._epoch = ""
        # Epochs that we have left for others: they go on without what we have done since.
        self._left: set[str] = set()
        self._is_lost = False
        self._changed = asyncio.Event()
        self._stirred = asyncio.Event()
        self._sweeper = Sweeper()
        self.session: Session | None = None
        self.presence = Presence.JOINING
        # Whether the ledger is to be asked for the open journals, by us.
        self.reads = asyncio.Event()
        self.outages = 0
        self.joins = 0

    @property
    def generation(self) -> int:
        """Of the newest connection on which we have begun to join."""
        return self._generation

    async def run(self) -> None:
        """Until cancelled."""
        backoff = Backoff(initial_s=0.02, maximum_s=0.25)
        while True:
            try:
                connection, run_id = await self._link.connect(self._unclaimed, self._note_loss)
            except RedisUnavailable as exc:
                self._note_loss(str(exc))
            else:
                try:
                    await self._stay(connection, run_id, backoff)
                finally:
                    connection.close()
                    self.session = None
                    self._be(Presence.AWAY)
            await asyncio.sleep(backoff.next_delay_s(0))

    async def settled(self, deadline: float) -> None:
        """Returns when we are no longer joining, or at the deadline (on the event loop's clock)."""
        try:
            async with asyncio.timeout_at(deadline):
                while self.presence is Presence.JOINING:
                    await self._changed.wait()
        except TimeoutError:
            return

    async def changed(self, deadline: float) -> None:
        """Returns when where we stand has changed or a join was answered, or at the deadline."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._changed.wait()

    def leave(self, session: Session) -> None:
        """Redis does not know us there: join again."""
        if self.session is session:
            self.session = None
            self._be(Presence.JOINING)
            self._stirred.set()

    async def _stay(self, connection: RedisConnection, run_id: str, backoff: Backoff) -> None:
        """As long as the connection lasts."""
        while not connection.lost:
            session = self.session
            if session is None:
                session = await self._join(connection, run_id)
                if session is None:
                    continue
                backoff.reset()
            self._stirred.clear()
            try:
                async with asyncio.timeout(POLL_S):
                    await self._stirred.wait()
            except TimeoutError:
                await self._poll(session)
                await self._sweeper.step(connection)

    async def _join(self, connection: RedisConnection, run_id: str) -> Session | None:
        said = await self._say_hello(connection, run_id)
        if said is None:
            return None
        epoch, before = said
        if epoch != self._epoch:
            if self._epoch:
                self._left.add(self._epoch)
                log.warning("redis.epoch_changed", advice="budgets begin again with the ledger's sums")
            self._epoch = epoch
        luggage = self._traveller.pack(epoch, self._generation, before)
        session = Session(connection, self._link, epoch, self._journal_id, self._generation)
        tail = encode_arguments(
            b"2",
            session.journal,
            EPOCH.encode(),
            epoch.encode(),
            self._journal_id.encode(),
            b"%d" % self._generation,
            b"%d" % luggage.position,
            luggage.payload,
        )
        answer = connection.evaluate(self._link.scripts.join, tail)
        # What is sent from here on comes after it.
        self.session = session
        self._be(Presence.JOINED)
        reply = await answer
        state = _JOINED.decode(reply) if isinstance(reply, bytes) else []
        if not state:
            self.leave(session)
            return None
        self.joins += 1
        if self._is_lost:
            self._is_lost = False
            log.info("redis.restored")
        session.ready = state[0] == _READY
        self._traveller.arrived()
        self._sweeper.begin()
        if self.session is not session:
            return None
        self._be(Presence.JOINED)
        return session

    async def _say_hello(self, connection: RedisConnection, run_id: str) -> tuple[str, int] | None:
        """The epoch, and the generation that it knows of us."""
        outlived = ""
        while True:
            self._generation += 1
            reply = await connection.evaluate(
                self._link.scripts.hello,
                encode_arguments(
                    b"1",
                    EPOCH.encode(),
                    run_id.encode(),
                    secrets.token_hex(4).encode(),
                    self._journal_id.encode(),
                    b"%d" % self._generation,
                    outlived.encode(),
                ),
            )
            if not isinstance(reply, bytes):
                return None
            epoch, _, before = _HELLO.decode(reply)
            if epoch not in self._left:
                return epoch, before
            outlived = epoch

    async def _poll(self, session: Session) -> None:
        wanted = self._leases.wanted(session.epoch, asyncio.get_running_loop().time())
        tail = encode_arguments(
            b"2",
            session.journal,
            EPOCH.encode(),
            session.epoch.encode(),
            self._journal_id.encode(),
            b"%d" % session.generation,
            b"%d" % _READER_MS,
            _ENCODE(wanted),
        )
        reply = await session.connection.evaluate(self._link.scripts.poll, tail)
        if not isinstance(reply, bytes) or self.session is not session:
            return
        state, *rest = _POLLED.decode(reply) or [""]
        if not state:
            self.leave(session)
            return
        session.ready = state == _READY
        if rest[0]:
            self.reads.set()
        self._leases.got([int(value) for value in rest[1:]])

    def _note_loss(self, reason: str) -> None:
        self.session = None
        self._stirred.set()
        self._be(Presence.AWAY)
        if not self._is_lost:
            self._is_lost = True
            self.outages += 1
            log.warning("redis.lost", reason=reason)

    def _be(self, presence: Presence) -> None:
        self.presence = presence
        self._changed.set()
        self._changed = asyncio.Event()
