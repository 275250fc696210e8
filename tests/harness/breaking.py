"""Replicas that break at a chosen moment, and slots over them, for answers that go on elsewhere."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Sequence

from helixflow.core.call import Call
from helixflow.core.capacity import Replica
from helixflow.core.errors import ErrorKind, HelixError


class BreakingRelay:
    """Passes connections on to an engine. The first `breaks` generations are cut off after `events` events with
    content; what the engine sends meanwhile is lost, as if it had been killed.
    """

    def __init__(self, target: Replica) -> None:
        self._target = target
        self.events = 0
        self.breaks = 0
        self.broken = 0
        self.port = 0

    def break_after(self, events: int, *, times: int = 1) -> None:
        self.events, self.breaks, self.broken = events, times, 0

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = await asyncio.open_connection(self._target.host, self._target.port)
        up = asyncio.create_task(_pump(reader, target[1]))
        try:
            await self._down(target[0], writer)
        except ConnectionError:
            pass
        finally:
            up.cancel()
            target[1].transport.abort()
            writer.transport.abort()

    async def _down(self, source: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Event by event: chunks of llama.cpp's streams are events, each in one chunk of the transfer encoding."""
        seen, pending = 0, b""
        while data := await source.read(65536):
            if b"text/event-stream" not in data[:2000] and not pending and not seen and b"data: " not in data:
                writer.write(data)
                continue
            pending += data
            while (end := pending.find(b"\n\n\r\n")) >= 0:
                event, pending = pending[: end + 4], pending[end + 4 :]
                writer.write(event)
                has_content = b'"prompt_progress"' not in event and (b'"content":"' in event or b'"text":"' in event)
                seen += has_content
                if has_content and seen >= self.events and self.broken < self.breaks:
                    self.broken += 1
                    await writer.drain()
                    return
        writer.write(pending)
        await writer.drain()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


class ListedSlots:
    """Implements `core.capacity.Slots` over replicas that are used in their order, but for those that failed."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = list(replicas)
        self.leases: list[ListedLease] = []
        self.avoided: list[frozenset[str]] = []

    async def any_replica(self, deadline: float) -> Replica:
        return self._replicas[0]

    def replicas(self) -> Sequence[Replica]:
        return self._replicas

    def has_alternative(self) -> bool:
        return len({lease.replica.replica_id for lease in self.leases if lease.failed}) < len(self._replicas)

    async def acquire(self, call: Call, *, avoid: Collection[str] = ()) -> "ListedLease":
        self.avoided.append(frozenset(avoid))
        for replica in self._replicas:
            if replica.replica_id not in avoid:
                lease = ListedLease(replica)
                self.leases.append(lease)
                return lease
        raise HelixError(ErrorKind.OVERLOADED, "No replica is left.")


class ListedLease:
    """One slot, and how it was given back."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self.released = 0
        self.failed = False
        self.charged = 0

    @property
    def replica(self) -> Replica:
        return self._replica

    def charge(self, tokens: int) -> None:
        self.charged += tokens

    def release(self, *, failed: bool = False) -> None:
        if not self.released:
            self.failed = failed
        self.released += 1
