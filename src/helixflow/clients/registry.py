"""The two sides of the registry of pools: a gateway that follows it, and a pool that keeps its entry there."""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc
import structlog

from helixflow.clients.watching import FIRST_MESSAGE_TIMEOUT_S, STREAM_DEADLINE_S, Watch
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.process.backoff import Backoff
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.pool_v1 import registry_pb2, registry_pb2_grpc

_GOODBYE_S: Final = 1.0
_LEAST_HEARTBEAT_S: Final = 0.1
log = structlog.get_logger("helixflow.clients")


@dataclass(frozen=True, slots=True)
class PoolAddress:
    """Where other nodes reach a pool: `host:port` of its gRPC and of its data port."""

    name: str
    address: str
    data_address: str


class RegistryWatch:
    """Follows the set of pools that other nodes have; the one of the registry's own node is left out.

    `on_change` is called on the event loop with the pools by name and, unless the set is complete, the names of those
    that are known to have gone: others that are missing may only not have come back yet. While the registry is away
    nothing is called: the last set stays.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        on_change: Callable[[Mapping[str, PoolAddress], Collection[str] | None], None],
    ) -> None:
        self._stub = registry_pb2_grpc.RegistryServiceStub(channel)
        self._on_change = on_change

    async def run(self) -> None:
        """Watches until cancelled."""
        await Watch("pools", self._open_watch, self._on_set, lambda: None).run()

    def _open_watch(self, timeout_s: float) -> object:
        return self._stub.WatchPools(registry_pb2.WatchPoolsRequest(), timeout=timeout_s)

    def _on_set(self, message: registry_pb2.WatchPoolsResponse, _first: bool) -> None:
        reachable = {
            pool.name: PoolAddress(pool.name, pool.address, pool.data_address)
            for pool in message.pools
            if pool.name != message.local and pool.address and pool.data_address
        }
        self._on_change(reachable, None if message.complete else frozenset(message.left))


class Registration:
    """Keeps a pool registered: `run` it while the pool serves; cancelled, it takes the pool off the set.

    `registered` is set while the registry has it.
    """

    def __init__(self, channel: grpc.aio.Channel, pool: registry_pb2.Pool) -> None:
        self._stub = registry_pb2_grpc.RegistryServiceStub(channel)
        self._pool = pool
        # A registry that is back wants its pools back before gateways take the set for complete.
        self._backoff = Backoff(initial_s=0.05, maximum_s=0.5, jitter=0.5)
        self._failure = ""
        self.registered = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled; what keeps it from registering is logged once and tried again."""
        while True:
            try:
                await self._stay()
            except HelixError as exc:
                if exc.message != self._failure:
                    self._failure = exc.message
                    log.warning("registration.failed", pool=self._pool.name, code=exc.code, reason=exc.message)
            await asyncio.sleep(self._backoff.next_delay_s(0))

    async def _stay(self) -> None:
        """Registers and sends heartbeats. Raises `HelixError` when the stream ends."""
        call: Any = self._stub.Register(timeout=STREAM_DEADLINE_S)
        # Only one reads, and is not cancelled before the call's end: that would be the call's end.
        reading: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(FIRST_MESSAGE_TIMEOUT_S):
                await call.write(registry_pb2.RegisterRequest(pool=self._pool))
                answer = await call.read()
            if answer is grpc.aio.EOF:
                raise HelixError(ErrorKind.UNAVAILABLE, "The registry ended the stream.")
            reading = asyncio.create_task(_read_to_end(call), name="registration")
            self._begin()
            pause_s = max(answer.heartbeat_s, _LEAST_HEARTBEAT_S)
            while not (await asyncio.wait({reading}, timeout=pause_s))[0]:
                await call.write(registry_pb2.RegisterRequest())
            reading.result()
            raise HelixError(ErrorKind.UNAVAILABLE, "The registry ended the stream.")
        except TimeoutError as exc:
            raise HelixError(ErrorKind.DEADLINE, "The registry did not answer in time.") from exc
        except grpc.RpcError as exc:
            error = from_rpc_error(exc)
            # An hour is over: it is registered anew at once.
            if error.kind is not ErrorKind.DEADLINE:
                raise error from exc
        except asyncio.InvalidStateError as exc:  # grpc's way to say that one writes to an ended call
            raise HelixError(ErrorKind.UNAVAILABLE, "The registry ended the stream.") from exc
        except asyncio.CancelledError:
            if reading is not None:
                await _say_goodbye(call, reading)
            raise
        finally:
            self.registered.clear()
            call.cancel()
            if reading is not None:
                await asyncio.gather(reading, return_exceptions=True)

    def _begin(self) -> None:
        self._backoff.reset()
        self._failure = ""
        self.registered.set()
        log.info("pool.registered", pool=self._pool.name)


async def _read_to_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def _say_goodbye(call: Any, reading: "asyncio.Task[None]") -> None:
    """Ends the stream as its pool wants it to end, so that gateways know at once."""
    with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError, asyncio.CancelledError):
        await call.write(registry_pb2.RegisterRequest(leaving=True))
        await call.done_writing()
        await asyncio.wait({reading}, timeout=_GOODBYE_S)
