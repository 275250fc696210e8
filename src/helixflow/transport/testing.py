"""A scripted HTTP server for tests: shipped, because other rooms' tests and users' extensions need it."""

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

from helixflow.transport.origin import Origin


@dataclass(frozen=True, slots=True)
class Send:
    """Writes `data`, `times` times over, at the client's pace."""

    data: bytes
    times: int = 1


@dataclass(frozen=True, slots=True)
class Wait:
    """Goes on once `event` is set, or ends with the connection."""

    event: asyncio.Event


@dataclass(frozen=True, slots=True)
class Close:
    """Closes the connection in good order after everything written."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Drops the connection at once."""


Step = Send | Wait | Close | Reset


def answer(body: bytes, *, status: str = "200 OK", headers: Iterable[tuple[str, str]] = ()) -> Send:
    """A whole response with `content-length`."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return Send(f"HTTP/1.1 {status}\r\n{lines}content-length: {len(body)}\r\n\r\n".encode() + body)


def event_stream(events: Iterable[bytes] = (), *, end: bool = True) -> list[Step]:
    """A chunked `text/event-stream` response, one chunk an event; without `end` it stays open."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return [Send(head), *(Send(chunk(event)) for event in events), *([Send(LAST_CHUNK)] if end else [])]


def chunk(data: bytes) -> bytes:
    """`data` as one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK: Final = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """A request as it arrived. `connection` counts from 0; header names are in lower case; `raw` is head and body."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int
    raw: bytes


@dataclass(slots=True)
class RecordedConnection:
    """`lost` is set once the client's end is gone (or ours closed it)."""

    lost: asyncio.Event = field(default_factory=asyncio.Event)


class ScriptedUpstream:
    """Listens on a free loopback port, or on the Unix socket at `path`, while used as an async context manager.

    Each request, on whatever connection, plays the next of `scripts`; a request beyond them gets a 500. `requests` and
    `connections` record what came. Understands bodies with `content-length` only.
    """

    def __init__(
        self,
        scripts: Iterable[Sequence[Step]],
        *,
        ssl_context: ssl.SSLContext | None = None,
        path: Path | None = None,
    ) -> None:
        self._scripts = [list(script) for script in scripts]
        self._ssl_context = ssl_context
        self._path = path
        self._server: asyncio.Server | None = None
        self._players: set[_Player] = set()
        self._arrived = asyncio.Condition()
        self.requests: list[RecordedRequest] = []
        self.connections: list[RecordedConnection] = []

    async def __aenter__(self) -> "ScriptedUpstream":
        loop = asyncio.get_running_loop()
        if self._path is not None:
            self._server = await loop.create_unix_server(lambda: _Player(self), str(self._path))
        else:
            self._server = await loop.create_server(lambda: _Player(self), "127.0.0.1", 0, ssl=self._ssl_context)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for player in list(self._players):
            await player.stop()
        await self._server.wait_closed()

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def origin(self) -> Origin:
        if self._path is not None:
            return Origin.unix(self._path)
        return Origin("https" if self._ssl_context else "http", "127.0.0.1", self.port)

    @property
    def base_url(self) -> str:
        return f"{self.origin.scheme}://{self.origin.authority}"

    async def arrival(self, count: int) -> None:
        """Waits until `count` requests have arrived."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.requests) >= count)

    async def record(self, request: RecordedRequest) -> list[Step]:
        async with self._arrived:
            position = len(self.requests)
            self.requests.append(request)
            self._arrived.notify_all()
        if position < len(self._scripts):
            return self._scripts[position]
        return [answer(b"no script left for this request", status="500 Internal Server Error")]

    def register(self, player: "_Player") -> int:
        self._players.add(player)
        self.connections.append(player.record)
        return len(self.connections) - 1

    def unregister(self, player: "_Player") -> None:
        self._players.discard(player)


class _Player(asyncio.Protocol):
    """One connection: reads requests, plays a script for each."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self.record = RecordedConnection()
        self._upstream = upstream
        self._number = 0
        self._buffer = bytearray()
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._number = self._upstream.register(self)
        self._task = asyncio.get_running_loop().create_task(self._play_all(self._transport))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._readable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.record.lost.set()
        self._upstream.unregister(self)
        if self._task is not None:
            self._task.cancel()

    async def stop(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        await self.record.lost.wait()
        if self._task is not None:
            with contextlib.suppress(asyncio.CancelledError):  # connection_lost cancelled it
                await self._task

    async def _play_all(self, transport: asyncio.Transport) -> None:
        while True:
            request = await self._read_request()
            for step in await self._upstream.record(request):
                match step:
                    case Send(data, times):
                        for _ in range(times):
                            transport.write(data)
                            await self._writable.wait()
                    case Wait(event):
                        await event.wait()
                    case Close():
                        transport.close()
                        return
                    case Reset():
                        transport.abort()
                        return

    async def _read_request(self) -> RecordedRequest:
        head = await self._read_until(lambda data: data.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in data else 0)
        first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        method, target, _version = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = int(headers.get("content-length", "0"))
        body = await self._read_until(lambda data: size if len(data) >= size else 0) if size else b""
        return RecordedRequest(method, target, headers, body, self._number, head + body)

    async def _read_until(self, measure: Callable[[bytearray], int]) -> bytes:
        """Takes as many bytes as `measure` says, waiting while it says 0."""
        while not (end := measure(self._buffer)):
            self._readable.clear()
            await self._readable.wait()
        data = bytes(self._buffer[:end])
        del self._buffer[:end]
        return data
