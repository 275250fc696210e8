"""Load on raw asyncio protocols: connections that send the next request as soon as the last answer is complete, single
requests at a fixed rate, and streams whose gaps are watched.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

# Connections for requests at a fixed rate: enough for a stall of a quarter of a second at 500/s.
CONNECTIONS_AT_RATE = 128


def http_request(port: int, body: bytes, api_key: str, path: str = "/v1/chat/completions") -> bytes:
    """A whole request, sent unchanged again and again."""
    return (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {api_key}\r\nuser-agent: bench\r\naccept: */*\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body


@dataclass(slots=True)
class Tally:
    """What a load has seen so far. Gaps are seconds between two reads of one stream."""

    answers: int = 0
    errors: int = 0
    events: int = 0
    longest_gap_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    problem: str = ""

    def reset(self) -> None:
        self.answers = self.errors = self.events = 0
        self.longest_gap_s = 0.0
        self.latencies_s.clear()


class Requester(asyncio.Protocol):
    """One connection. `send` starts it; with `again` the next request follows as soon as an answer is complete.

    Answers are framed by content-length or end with the last chunk; their content is only counted.
    """

    def __init__(
        self,
        request: bytes,
        tally: Tally,
        *,
        again: bool = True,
        watch_gaps: bool = False,
        on_answer: "Callable[[Requester], None] | None" = None,
    ) -> None:
        self._request = request
        self._tally = tally
        self._again = again
        self._watch_gaps = watch_gaps
        self._on_answer = on_answer
        self._rest = -1  # bytes of a body with content-length still to come; -1 before the head, -2 for a chunked body
        self._head = b""
        self._tail = b""
        self._last_read = 0.0
        self.busy = False
        self.has_data = False
        self.sent_at = 0.0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.busy:
            self._tally.errors += 1
            self._tally.problem = f"connection lost: {exc}"

    def send(self) -> None:
        if self.transport is None:
            self._tally.errors += 1
            return
        self.busy = True
        self._rest = -1
        self._last_read = 0.0
        self.sent_at = time.perf_counter()
        self.transport.write(self._request)

    def stop(self) -> None:
        self._again = False
        self.busy = False
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        rest = self._rest
        if rest == -1:
            data = self._head + data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._head = data
                return
            self._head = b""
            if not data.startswith(b"HTTP/1.1 200"):
                self._tally.errors += 1
                self._tally.problem = data[:400].decode("latin-1")
            at = data[:end].lower().find(b"content-length: ")
            if at < 0:
                rest = self._rest = -2
                data = data[end + 4 :]
            else:
                size = int(data[at + 16 : data.index(b"\r", at)])
                rest = size - (len(data) - end - 4)
                data = b""
        elif rest >= 0:
            rest -= len(data)
        if rest == -2:
            self._receive_chunks(data)
            return
        self._rest = rest
        if rest == 0:
            self._complete()

    def _receive_chunks(self, data: bytes) -> None:
        tally = self._tally
        tally.events += data.count(b"data: ")
        self.has_data = True
        if self._watch_gaps:
            now = time.perf_counter()
            if self._last_read and now - self._last_read > tally.longest_gap_s:
                tally.longest_gap_s = now - self._last_read
            self._last_read = now
        tail = self._tail + data[-7:] if len(data) < 7 else data
        if tail.endswith(b"\r\n0\r\n\r\n"):
            self._tail = b""
            self._complete()
        else:
            self._tail = tail[-7:]

    def _complete(self) -> None:
        self._tally.answers += 1
        self.busy = False
        if self._on_answer is not None:
            self._on_answer(self)
        elif self._again:
            self.send()


class Load:
    """`connections` connections, each sending `request` over and over; an async context manager."""

    def __init__(self, port: int, request: bytes, connections: int, *, watch_gaps: bool = False) -> None:
        self._port = port
        self._request = request
        self._count = connections
        self._watch_gaps = watch_gaps
        self.requesters: list[Requester] = []
        self.tally = Tally()

    async def __aenter__(self) -> "Load":
        loop = asyncio.get_running_loop()
        for _ in range(self._count):
            _, requester = await loop.create_connection(
                lambda: Requester(self._request, self.tally, watch_gaps=self._watch_gaps), "127.0.0.1", self._port
            )
            self.requesters.append(requester)
            requester.send()
        return self

    async def __aexit__(self, *_: object) -> None:
        for requester in self.requesters:
            requester.stop()
        await asyncio.sleep(0.05)


async def measure_latency(port: int, request: bytes, rate: float, duration_s: float) -> Tally:
    """Sends `rate` requests a second, evenly, each on an idle connection; latencies count from the sending."""
    loop = asyncio.get_running_loop()
    tally = Tally()
    idle: list[Requester] = []

    def answered(requester: Requester) -> None:
        tally.latencies_s.append(time.perf_counter() - requester.sent_at)
        idle.append(requester)

    for _ in range(CONNECTIONS_AT_RATE):
        _, requester = await loop.create_connection(
            lambda: Requester(request, tally, on_answer=answered), "127.0.0.1", port
        )
        idle.append(requester)
    everyone = list(idle)
    started = loop.time()
    finished = loop.create_future()
    total = int(rate * duration_s)
    sent = 0

    def tick() -> None:
        nonlocal sent
        if sent == total:
            finished.set_result(None)
            return
        if idle:
            idle.pop().send()
        else:
            tally.errors += 1
            tally.problem = "all connections busy"
        sent += 1
        loop.call_at(started + sent / rate, tick)

    tick()
    await finished
    await asyncio.sleep(0.1)
    for requester in everyone:
        requester.stop()
    return tally


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of `values` lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
