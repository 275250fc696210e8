"""LeaseSlots of PoolService: the streams of gateways to the brokers of this node's deployments, and what engines say of
the slots of gateways that were lost.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from typing import Any, Final

import grpc
import structlog

from helixflow.core.clock import Clock, SystemClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.engines.launching import EngineKind
from helixflow.pool.lifecycle import DeploymentView
from helixflow.pool.plan import PlannedDeployment
from helixflow.pool.slot_broker import SlotBroker
from helixflow.pool.slot_session import Session
from helixflow.rpc.generated.pool_v1.pool_pb2 import LeaseSlotsRequest, LeaseSlotsResponse

TELL_S: Final = 0.25
# While contention may end, or slots are looked for.
_SOON_S: Final = 0.05
_PROBE_DEADLINE_S: Final = 2.0
_FIRST_MESSAGE_S: Final = 5.0
_MOST_UNSENT: Final = 10_000
_MOST_REPLICAS: Final = 1024

Context = grpc.aio.ServicerContext[Any, Any]
log = structlog.get_logger("helixflow.pool")


class SlotService:
    """The brokers of all deployments. Implements `Activity`. `run` it while the pool serves.

    `kinds` are those of engines, by their names in the settings.
    """

    def __init__(self, kinds: Mapping[str, EngineKind], *, clock: Clock | None = None) -> None:
        self._kinds = kinds
        self._clock = clock if clock is not None else SystemClock()
        self._brokers: dict[str, SlotBroker] = {}
        self._planned: dict[str, PlannedDeployment] = {}
        self._views: dict[str, DeploymentView] = {}
        self._is_draining = False
        self._due = asyncio.Event()
        self._on_idle: list[Callable[[str], None]] = []
        self._busy: set[str] = set()
        self._closed = asyncio.Event()

    # Activity.

    def busy(self, deployment: str) -> int:
        broker = self._brokers.get(deployment)
        return broker.busy if broker is not None else 0

    def busy_slots(self, deployment: str) -> Mapping[str, int]:
        broker = self._brokers.get(deployment)
        return {name: broker.busy_of(name) for name in broker.stock.replicas} if broker is not None else {}

    def last_used(self, deployment: str) -> float:
        broker = self._brokers.get(deployment)
        return broker.last_used if broker is not None else 0.0

    def on_idle(self, callback: Callable[[str], None]) -> None:
        self._on_idle.append(callback)

    # What there is.

    def plan(self, planned: Iterable[PlannedDeployment]) -> None:
        """The deployments of this node. Gateways may lease slots of these and of no others."""
        self._planned = {one.name: one for one in planned}
        for name, one in self._planned.items():
            if name not in self._brokers:
                self._brokers[name] = SlotBroker(
                    max_queue=one.settings.max_queue, clock=self._clock, on_change=self._due.set
                )
                self._brokers[name].drain(resume=not self._is_draining)
            self._brokers[name].limit_queue(one.settings.max_queue)
        for name in [name for name in self._brokers if name not in self._planned]:
            # Its gateways learn by their own settings that it is gone.
            if not self._brokers[name].sessions:
                del self._brokers[name]

    def update(self, views: Iterable[DeploymentView], *, inherited: Collection[str] = ()) -> None:
        """The replicas that serve now. Those `inherited` ran before this process did."""
        self._views = {view.deployment: view for view in views}
        for name, broker in self._brokers.items():
            view = self._views.get(name)
            replicas = {one.replica.replica_id: one.replica.slots for one in view.replicas} if view is not None else {}
            broker.update(replicas, inherited=inherited)

    def drain(self, *, resume: bool = False) -> None:
        """Takes back all slots and grants none; or begins again."""
        self._is_draining = not resume
        for broker in self._brokers.values():
            broker.drain(resume=resume)

    async def run(self) -> None:
        """Tells gateways what has changed, and looks for lost slots. Ends only by being cancelled."""
        wait_s: float | None = None
        while True:
            try:
                async with asyncio.timeout(wait_s):
                    await self._due.wait()
            except TimeoutError:
                pass
            self._due.clear()
            wait_s = _SOON_S if await self._tend() else None
            # What changes is told at most so often.
            await asyncio.sleep(TELL_S if wait_s is None else _SOON_S)

    def close(self) -> None:
        """Ends the streams, which else never end."""
        self._closed.set()

    async def _tend(self) -> bool:
        """Whether there is more to do soon, although nothing may change."""
        soon = False
        for name, broker in list(self._brokers.items()):
            for replica_id in broker.stock.overdue():
                await self._probe(name, broker, replica_id)
            if broker.stock.conclude():
                broker.serve()
            soon = broker.tell() or broker.stock.missing > 0 or soon
        self._tell_idle()
        return soon

    def _tell_idle(self) -> None:
        busy = {name for name, broker in self._brokers.items() if broker.busy}
        idle, self._busy = self._busy - busy, busy
        for name in idle:
            for callback in self._on_idle:
                callback(name)

    async def _probe(self, deployment: str, broker: SlotBroker, replica_id: str) -> None:
        """Asks an engine how many generations it has, to find out which slots of lost gateways are free."""
        view, planned = self._views.get(deployment), self._planned.get(deployment)
        if view is None or planned is None:
            return
        replica = next((one.replica for one in view.replicas if one.replica.replica_id == replica_id), None)
        if replica is None:
            return
        before = broker.reported_of(replica_id)
        kind = self._kinds[planned.settings.engine]
        try:
            active = await kind.read_activity(replica.port, replica.api_key, _PROBE_DEADLINE_S)
        except HelixError as exc:
            log.debug("slots.not_found", replica=replica_id, reason=exc.message)
            return
        after = broker.reported_of(replica_id)
        broker.stock.found(replica_id, active, {name: min(before.get(name, 0), now) for name, now in after.items()})

    # Streams.

    async def lease(self, requests: AsyncIterator[LeaseSlotsRequest], context: Context) -> None:
        """One gateway's stream. Raises `HelixError`: NOT_FOUND for an unknown deployment, INVALID_REQUEST for a stream
        that does not begin with `Open`.
        """
        await context.send_initial_metadata(())
        opened = await _first_of(requests)
        broker = self._brokers.get(opened.deployment)
        if broker is None:
            raise HelixError(ErrorKind.NOT_FOUND, f"There is no deployment {opened.deployment!r} on this node.")
        outbox = _Outbox()
        session = broker.join(opened.gateway, opened.holding, outbox.put)
        reading = asyncio.create_task(_read(requests, broker, session), name="slots: reading")
        writing = asyncio.create_task(outbox.write_to(context), name="slots: writing")
        closing = asyncio.create_task(self._closed.wait(), name="slots: closing")
        tasks = (reading, writing, closing)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            broker.leave(session)
            if opened.deployment not in self._planned and not broker.sessions:
                self._brokers.pop(opened.deployment, None)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _first_of(requests: AsyncIterator[LeaseSlotsRequest]) -> LeaseSlotsRequest.Open:
    try:
        async with asyncio.timeout(_FIRST_MESSAGE_S):
            first = await anext(requests, None)
    except TimeoutError as exc:
        raise HelixError(ErrorKind.REQUEST_TIMEOUT, "The stream did not begin in time.") from exc
    if first is None or first.WhichOneof("kind") != "open" or not first.open.gateway:
        raise HelixError(ErrorKind.INVALID_REQUEST, "The stream must begin with the gateway's name and what it holds.")
    if len(first.open.holding) > _MOST_REPLICAS:
        raise HelixError(ErrorKind.INVALID_REQUEST, "The gateway says that it holds slots of too many replicas.")
    return first.open


async def _read(requests: AsyncIterator[LeaseSlotsRequest], broker: SlotBroker, session: Session) -> None:
    async for request in requests:
        broker.receive(session, request)


class _Outbox:
    """Messages to one gateway, in order. One that does not read them is cut off."""

    def __init__(self) -> None:
        self._messages: deque[LeaseSlotsResponse] = deque()
        self._filled = asyncio.Event()
        self._overflowing = False

    def put(self, message: LeaseSlotsResponse) -> None:
        self._overflowing = self._overflowing or len(self._messages) >= _MOST_UNSENT
        if not self._overflowing:
            self._messages.append(message)
        self._filled.set()

    async def write_to(self, context: Context) -> None:
        """Ends when the gateway does not keep up."""
        while not self._overflowing:
            await self._filled.wait()
            self._filled.clear()
            while self._messages and not self._overflowing:
                await context.write(self._messages.popleft())
