"""What this gateway's deployments charge: always at hand, kept up to date beside the requests."""

import asyncio
from collections.abc import Sequence
from typing import Final

import grpc
import structlog

from helixflow.clients.changes import ChangeWatch
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.prices import Price, decode_price
from helixflow.process.backoff import Backoff
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.auth_v1 import identity_pb2, metering_pb2, metering_pb2_grpc

LOAD_TIMEOUT_S: Final = 5.0
# Prices that change within the day are said for two days ahead: they are asked for again long before.
REFRESH_S: Final = 3600.0
# At the start the services come up in any order: who has no prices after so long has something to say.
QUIET_S: Final = 10.0
# The moment that no price reaches: the end of the last period.
_NEVER: Final = 2**62

log = structlog.get_logger("helixflow.metering")

# A call is settled by the price of its admission: what held so long ago is asked for no more.
KEEP_MS: Final = 86_400_000

# From, before, price; without gaps from 0 to `_NEVER`.
_Period = tuple[int, int, Price]
_UNKNOWN: Final[_Period] = (0, 0, Price())
_Timelines = dict[str, tuple[_Period, ...]]


class PriceBook:
    """Prices by deployment, as the auth service tells them. `run` it for as long as it is asked.

    Follows `watch`: on a change of prices, or when one may have been missed, all are asked for again; until the answer
    is there, and while auth is away, those that are known go on. What was said of a moment that has passed stays so:
    what a call may cost was reserved by it. `ready` is False until there were some: calls are then rated as nothing,
    without a version.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        watch: ChangeWatch,
        deployments: Sequence[metering_pb2.DeploymentRef],
        clock: Clock,
        *,
        backoff: Backoff | None = None,
    ) -> None:
        self._stub = metering_pb2_grpc.MeteringServiceStub(channel)
        self._now = clock.now
        self._monotonic = clock.monotonic
        self._refs = {ref.deployment: ref for ref in deployments}
        # Those that are not there any more, and since when: calls that they served are still to be settled.
        self._gone: dict[str, float] = {}
        self._timelines: _Timelines = {}
        # The period that each deployment was last asked for, which is nearly always that of the next question too.
        self._current: dict[str, _Period] = dict.fromkeys(self._refs, _UNKNOWN)
        self._stale = asyncio.Event()
        self._stale.set()
        self._backoff = backoff or Backoff(initial_s=0.1, maximum_s=5.0, jitter=0.5)
        self.ready = not self._refs
        watch.follow(self)

    def price(self, deployment: str, at_ms: int) -> Price:
        """What `deployment` charges for a call that was admitted then; milliseconds since the epoch."""
        begun, ended, price = self._current[deployment]
        if begun <= at_ms < ended:
            return price
        return self._turn_to(deployment, at_ms)

    def dearest_bound(
        self, deployments: Sequence[str], at_ms: int, prompt_tokens: int, completion_tokens: int, engine_ms: int
    ) -> int:
        """Nanodollars that a call of at most so many tokens and so much time costs at most, whichever serves it."""
        dearest = 0
        for deployment in deployments:
            bound = self.price(deployment, at_ms).bound(prompt_tokens, completion_tokens, engine_ms)
            if bound > dearest:
                dearest = bound
        return dearest

    async def use(self, deployments: Sequence[metering_pb2.DeploymentRef]) -> None:
        """These are the deployments from now on. Returns once it is known what they charge; what is gone is known for a
        day more. Raises `HelixError` when nobody can say it; nothing has changed then.
        """
        wanted = {ref.deployment: ref for ref in deployments}
        asked = [ref for name, ref in wanted.items() if not self.ready or self._refs.get(name) != ref]
        timelines = await self._ask(asked)
        now_s = self._monotonic()
        self._gone = {name: self._gone.get(name, now_s) for name in self._current if name not in wanted}
        for name in [name for name, since_s in self._gone.items() if now_s - since_s > KEEP_MS / 1000]:
            for held in (self._gone, self._current, self._timelines):
                held.pop(name, None)
        self._refs = wanted
        for name in wanted:
            self._current.setdefault(name, _UNKNOWN)
        self._use(timelines)

    async def run(self) -> None:
        """Asks for prices when they may have changed, and now and then, until cancelled."""
        began_s, told = self._monotonic(), False
        while True:
            self._stale.clear()
            try:
                timelines = await self._ask(list(self._refs.values()))
            except HelixError as exc:
                # Once for each outage.
                if not told and (self.ready or self._monotonic() - began_s >= QUIET_S):
                    told = True
                    event = "prices.unreadable" if self.ready else "prices.unknown"
                    log.warning(event, code=exc.code, reason=exc.message)
                pause_s = self._backoff.next_delay_s(0)
            else:
                if told:
                    told = False
                    log.info("prices.restored" if self.ready else "prices.known")
                self._backoff.reset()
                self._use(timelines)
                pause_s = REFRESH_S
            try:
                async with asyncio.timeout(pause_s):
                    await self._stale.wait()
            except TimeoutError:
                pass  # nobody said that anything has changed: it is time to look anyway

    def forget(self) -> None:
        """What was missed may be a change of prices: those that are known go on until it is known which."""
        self._stale.set()

    def begin(self, changes: Sequence[identity_pb2.Change]) -> None:
        """Prices void no token."""

    def apply(self, change: identity_pb2.Change) -> None:
        if change.kind == identity_pb2.CHANGE_KIND_PRICES:
            self._stale.set()

    def trust(self, watch: ChangeWatch) -> None:
        """Prices are not signed."""

    def _turn_to(self, deployment: str, at_ms: int) -> Price:
        """The period of that moment becomes the current one."""
        for period in self._timelines.get(deployment, ()):
            if period[0] <= at_ms < period[1]:
                self._current[deployment] = period
                return period[2]
        return self._current[deployment][2]

    def _use(self, timelines: _Timelines) -> None:
        now_ms = int(self._now() * 1000)
        for deployment, new in timelines.items():
            old = self._timelines.get(deployment)
            self._timelines[deployment] = new if old is None else _joined(old, new, now_ms + 1)
            self._turn_to(deployment, now_ms + 1)
        self.ready = True

    async def _ask(self, refs: Sequence[metering_pb2.DeploymentRef]) -> _Timelines:
        """What they charge. Raises `HelixError`."""
        if not refs:
            return {}
        request = metering_pb2.ResolvePricesRequest(deployments=refs)
        try:
            answer = await self._stub.ResolvePrices(request, timeout=LOAD_TIMEOUT_S)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc) from exc
        timelines = _read(answer.prices)
        if timelines.keys() != {ref.deployment for ref in refs}:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The auth service did not say what all deployments charge.")
        return timelines


def _joined(old: tuple[_Period, ...], new: tuple[_Period, ...], cut_ms: int) -> tuple[_Period, ...]:
    """What was known before `cut_ms`, and what is new from then on, whatever the clock there says."""
    kept = [(begun, min(ended, cut_ms), price) for begun, ended, price in old if begun < cut_ms]
    coming = [(max(begun, cut_ms), ended, price) for begun, ended, price in new if ended > cut_ms]
    joined: list[_Period] = []
    for begun, ended, price in (*kept, *coming):
        if joined and (joined[-1][2] == price or joined[-1][1] < cut_ms - KEEP_MS):
            # The same goes on, or nobody asks any more for what was.
            begun = joined.pop()[0]
        joined.append((begun, ended, price))
    return tuple(joined)


def _read(prices: Sequence[metering_pb2.DatedPrice]) -> _Timelines:
    """Raises `HelixError` UPSTREAM_INVALID for periods with gaps between them, or an end."""
    timelines: _Timelines = {}
    # Deployments of one model often charge the same.
    known: dict[bytes, Price] = {}
    for dated in prices:
        price = known.get(dated.price) or known.setdefault(dated.price, decode_price(dated.price))
        before = timelines.get(dated.deployment, ())
        if before and before[-1][1] != dated.valid_from_ms:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The auth service gave prices with gaps between them.")
        # Clocks differ: what holds there from now on may be asked for a little earlier here.
        begun = dated.valid_from_ms if before else 0
        timelines[dated.deployment] = (*before, (begun, dated.valid_to_ms or _NEVER, price))
    if any(timeline[-1][1] != _NEVER for timeline in timelines.values()):
        raise HelixError(ErrorKind.UPSTREAM_INVALID, "The auth service gave prices that end.")
    return timelines
