"""The stream over which a gateway leases slots of a deployment from a pool: kept open, opened again when it breaks."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

import grpc
import structlog

from helixflow.clients.watching import FIRST_MESSAGE_TIMEOUT_S, STREAM_DEADLINE_S
from helixflow.process.backoff import Backoff
from helixflow.rpc.errors import describe
from helixflow.rpc.generated.pool_v1 import pool_pb2_grpc
from helixflow.rpc.generated.pool_v1.pool_pb2 import LeaseSlotsRequest, LeaseSlotsResponse

# More than a gateway says to a pool that reads: one that does not is given up.
_MOST_UNSENT: Final = 10_000

log = structlog.get_logger("helixflow.clients")


class LeaseDesk(Protocol):
    """Who leases. Called on the event loop; must not block or raise."""

    def open(self, send: Callable[[LeaseSlotsRequest], None], gateway: str, deployment: str) -> None:
        """A connection stands: sends `Open`, and from then on what it likes. `send` keeps the order."""
        ...

    def receive(self, message: LeaseSlotsResponse) -> None: ...

    def lose(self) -> None:
        """The connection that had been opened is broken; `send` is of no use any more."""
        ...


class SlotLink:
    """Keeps the stream of one deployment. `gateway` identifies this process. `run` ends only by being cancelled."""

    def __init__(self, channel: grpc.aio.Channel, deployment: str, gateway: str, desk: LeaseDesk) -> None:
        self._stub = pool_pb2_grpc.PoolServiceStub(channel)
        self._deployment = deployment
        self._gateway = gateway
        self._desk = desk
        self._backoff = Backoff(initial_s=0.05, maximum_s=0.25, jitter=0.5)
        self._failing = False

    async def run(self) -> None:
        while True:
            try:
                await self._follow()
            except (grpc.RpcError, TimeoutError, asyncio.InvalidStateError) as exc:
                if not self._failing:
                    self._failing = True
                    log.debug("slots.lost", deployment=self._deployment, cause=describe(exc))
            await asyncio.sleep(self._backoff.next_delay_s(0))

    async def _follow(self) -> None:
        # Every call has a deadline; silence before it is watched by keepalive.
        call: Any = self._stub.LeaseSlots(timeout=STREAM_DEADLINE_S)
        try:
            async with asyncio.timeout(FIRST_MESSAGE_TIMEOUT_S):
                await call.wait_for_connection()
            outbox = _Outbox()
            writing = asyncio.create_task(outbox.write_to(call), name=f"slots of {self._deployment}")
            try:
                self._desk.open(outbox.put, self._gateway, self._deployment)
                await self._read(call, writing)
            finally:
                self._desk.lose()
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
        finally:
            call.cancel()

    async def _read(self, call: Any, writing: "asyncio.Task[None]") -> None:
        # Whoever cannot be written to any more is not listened to either.
        writing.add_done_callback(lambda _: call.cancel())
        async with asyncio.timeout(FIRST_MESSAGE_TIMEOUT_S):
            message = await call.read()
        self._failing = False
        self._backoff.reset()
        while message is not grpc.aio.EOF:
            self._desk.receive(message)
            message = await call.read()


class _Outbox:
    """Messages on their way out, in order."""

    def __init__(self) -> None:
        self._messages: deque[LeaseSlotsRequest] = deque()
        self._filled = asyncio.Event()
        self._overflowing = False

    def put(self, message: LeaseSlotsRequest) -> None:
        self._overflowing = self._overflowing or len(self._messages) >= _MOST_UNSENT
        if not self._overflowing:
            self._messages.append(message)
        self._filled.set()

    async def write_to(self, call: Any) -> None:
        """Until cancelled, or the call cannot be written to any more, or it does not keep up."""
        while not self._overflowing:
            await self._filled.wait()
            self._filled.clear()
            while self._messages and not self._overflowing:
                await call.write(self._messages.popleft())
