"""The HTTP/1.1 client: keep-alive pools per origin, deadlines, one safe retry.

Hot path: a request on a pooled connection costs one write and one future; no task, no timer. Deadlines are checked by
one coarse timer per client, so they fire up to `SWEEP_S` late.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Final

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.transport.connection import FOREVER, Connection, HttpResponse
from helixflow.transport.origin import Origin
from helixflow.transport.pool import OriginPool, PoolStats, Waiter
from helixflow.transport.request import Timeouts, build_head, join_request
from helixflow.transport.tls import client_context

__all__ = ["HttpClient", "HttpResponse", "PoolStats", "Timeouts", "build_head"]

SWEEP_S: Final = 0.25
# A reused connection that its server had given up fails at once. One that dies later may have died over the request.
STALE_WITHIN_S: Final = 1.0
# What we give up of a server's own idle timeout, so that we close before it does.
_KEEP_ALIVE_MARGIN_S: Final = 1.0

_UNREACHABLE: Final = "The model's server cannot be reached."
_CLOSED: Final = "The service is shutting down."


class HttpClient:
    """A client for many origins, with at most `max_connections` to each.

    `idle_expiry_s` bounds how long an idle connection is kept, 0 keeps none; a server's `Keep-Alive: timeout`
    shortens it.
    `max_buffer` is how many unread bytes of a response stop the reading of its socket (one more read may come).
    Without `ssl_context` the system's certificate authorities are trusted, loaded with the first https request. One
    that changes is given as a function, which is asked with each connection.
    """

    def __init__(
        self,
        *,
        max_connections: int = 1024,
        idle_expiry_s: float = 4.0,
        ssl_context: ssl.SSLContext | Callable[[], ssl.SSLContext] | None = None,
        max_buffer: int = 64 * 1024,
    ) -> None:
        self._max_connections = max_connections
        self._idle_expiry_s = idle_expiry_s
        self._ssl_context = ssl_context
        self._max_buffer = max_buffer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pools: dict[Origin, OriginPool[Connection]] = {}
        self._connections: set[Connection] = set()
        self._connecting: set[asyncio.Timeout] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False
        self._emptied: asyncio.Future[None] | None = None
        self._keep_alive = (b"", idle_expiry_s)  # the last Keep-Alive header and what it means

    async def request(
        self, origin: Origin, head: bytes, body: bytes, *, timeouts: Timeouts, deadline: float | None = None
    ) -> HttpResponse:
        """Sends `head` (of `build_head`) and `body`; returns once the response's head has arrived.

        `deadline` (event-loop clock, seconds) bounds everything, reading the body included. A reused connection that
        dies without a byte of response is replaced by a fresh one, once. Cancellation aborts the socket at once.
        Raises `HelixError`: `UPSTREAM_UNAVAILABLE` (no connection), `UPSTREAM_INVALID` (no HTTP), `DEADLINE`,
        `OVERLOADED` (no place in the pool in time), `SHUTTING_DOWN` (closed).
        """
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        pool = self._pools.get(origin)
        if pool is None:
            pool = self._pools[origin] = OriginPool(self._max_connections)
        if self._closed:
            raise HelixError(ErrorKind.SHUTTING_DOWN, _CLOSED)
        if self._sweeper is None:
            self._sweeper = loop.call_later(SWEEP_S, self._sweep)
        limit = FOREVER if deadline is None else deadline
        payload = join_request(head, body)
        bodiless = head.startswith(b"HEAD ")
        now = loop.time()
        if now >= limit:
            raise HelixError(ErrorKind.DEADLINE, "The request took longer than its time limit.")
        connection = pool.take(now)
        may_retry = True
        while True:
            if connection is None:
                connection = await self._acquire(origin, pool, timeouts, limit, fresh=not may_retry)
                now = loop.time()
            response = HttpResponse(loop, timeouts.idle_s, limit)
            try:
                await connection.begin(response, payload, now + timeouts.first_byte_s, bodiless=bodiless)
            except BaseException:
                response.close()
                raise
            if response.status:
                return response
            if not (may_retry and loop.time() - now < STALE_WITHIN_S and connection.died_idle(response)):
                raise response.error()
            may_retry = False
            connection = None

    async def close(self) -> None:
        """Aborts everything; afterwards no socket, timer or task of this client is left. Idempotent."""
        self._closed = True
        for pool in self._pools.values():
            for waiter in pool.overdue(FOREVER):
                waiter.turn.set_exception(HelixError(ErrorKind.SHUTTING_DOWN, _CLOSED))
        for timeout in self._connecting:
            timeout.reschedule(0)
        for connection in list(self._connections):
            connection.fail((ErrorKind.SHUTTING_DOWN, _CLOSED, None))
        while self._connections or self._connecting:
            if self._emptied is None:
                self._emptied = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._emptied)
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def stats(self) -> PoolStats:
        """The sum over all origins."""
        stats = [pool.stats() for pool in self._pools.values()]
        return PoolStats(sum(s.open for s in stats), sum(s.idle for s in stats), sum(s.waiting for s in stats))

    def made(self, connection: Connection) -> None:
        self._connections.add(connection)

    def released(self, connection: Connection) -> None:
        if self._closed:
            connection.abort()
            return
        assert self._loop is not None
        expiry_s = self._idle_expiry_s
        if (keep_alive := connection.keep_alive) is not None:
            expiry_s = self._server_expiry_s(keep_alive)
        if expiry_s <= 0:
            connection.abort()
            return
        connection.expires_at = self._loop.time() + expiry_s
        connection.pool.release(connection)

    def retired(self, connection: Connection) -> None:
        connection.pool.forget(connection)
        connection.pool.vacate()

    def lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._report_empty()

    async def _acquire(
        self, origin: Origin, pool: OriginPool[Connection], timeouts: Timeouts, limit: float, *, fresh: bool
    ) -> Connection:
        """A connection that is ready to `begin`: a new one, or unless `fresh` one that was handed on in the queue."""
        assert self._loop is not None
        while True:
            if pool.reserve():
                return await self._connect(origin, pool, timeouts, limit)
            if (idle := pool.evict()) is not None:
                idle.abort()  # frees its place
                continue
            waiter: Waiter[Connection] = Waiter(
                self._loop.create_future(), min(limit, self._loop.time() + timeouts.first_byte_s)
            )
            pool.waiters.append(waiter)
            try:
                connection = await waiter.turn
            except BaseException:
                self._return_turn(pool, waiter)
                raise
            if connection is None:
                return await self._connect(origin, pool, timeouts, limit)
            if not fresh and not connection.closed:
                return connection
            connection.abort()

    def _return_turn(self, pool: OriginPool[Connection], waiter: Waiter[Connection]) -> None:
        """A request was cancelled in the queue: what it had just been given goes to the next one."""
        turn = waiter.turn
        if not turn.done() or turn.cancelled() or turn.exception() is not None:
            return
        connection = turn.result()
        if connection is None:
            pool.vacate()
        elif not connection.closed:
            pool.release(connection)

    async def _connect(
        self, origin: Origin, pool: OriginPool[Connection], timeouts: Timeouts, limit: float
    ) -> Connection:
        """Opens a connection in a place already reserved; gives the place back on failure."""
        loop = self._loop
        assert loop is not None
        context: ssl.SSLContext | None = None
        connection = Connection(self, pool, self._max_buffer)
        connect_until = loop.time() + timeouts.connect_s
        timeout = asyncio.timeout_at(min(connect_until, limit))
        try:
            if self._closed:
                raise HelixError(ErrorKind.SHUTTING_DOWN, _CLOSED)
            server_name: str | None = None
            if origin.scheme == "https":
                if self._ssl_context is None:
                    self._ssl_context = client_context()
                known = self._ssl_context
                context = known if isinstance(known, ssl.SSLContext) else known()
                server_name = origin.server_name or None
            self._connecting.add(timeout)
            async with timeout:
                if origin.scheme == "unix":
                    await loop.create_unix_connection(lambda: connection, origin.host)
                else:
                    await loop.create_connection(
                        lambda: connection, origin.host, origin.port, ssl=context, server_hostname=server_name
                    )
            if self._closed:
                raise HelixError(ErrorKind.SHUTTING_DOWN, _CLOSED)
        except BaseException as exc:
            # Not every loop tells the protocol of a connection that fails while it is being made: uvloop says that it
            # was made and never that it was lost.
            if not connection.closed:
                connection.abort()
            self._connections.discard(connection)
            if isinstance(exc, TimeoutError) and timeout.expired():
                if self._closed:
                    raise HelixError(ErrorKind.SHUTTING_DOWN, _CLOSED) from exc
                if limit < connect_until:
                    raise HelixError(ErrorKind.DEADLINE, "The request took longer than its time limit.") from exc
                raise HelixError(ErrorKind.UPSTREAM_UNAVAILABLE, _UNREACHABLE) from exc
            if isinstance(exc, OSError | ssl.CertificateError):
                raise HelixError(ErrorKind.UPSTREAM_UNAVAILABLE, _UNREACHABLE) from exc
            raise
        finally:
            self._connecting.discard(timeout)
            self._report_empty()
        return connection

    def _report_empty(self) -> None:
        if self._emptied is not None and not self._connections and not self._connecting:
            if not self._emptied.done():
                self._emptied.set_result(None)
            self._emptied = None

    def _server_expiry_s(self, header: bytes) -> float:
        """How long we keep a connection whose server says `Keep-Alive: timeout=N`."""
        known, expiry_s = self._keep_alive
        if header != known:
            expiry_s = self._idle_expiry_s
            for field in header.lower().split(b","):
                name, _, value = field.strip().partition(b"=")
                if name == b"timeout" and value.isdigit():
                    expiry_s = min(expiry_s, int(value) - _KEEP_ALIVE_MARGIN_S)
            self._keep_alive = (header, expiry_s)
        return expiry_s

    def _sweep(self) -> None:
        """Fails what is overdue, closes what is idle for too long; stops when nothing is left to watch."""
        loop = self._loop
        assert loop is not None
        now = loop.time()
        for connection in list(self._connections):
            if connection.deadline <= now:
                connection.expire()
        busy = bool(self._connections)
        for pool in self._pools.values():
            for connection in pool.expired(now):
                connection.abort()
            for waiter in pool.overdue(now):
                waiter.turn.set_exception(
                    HelixError(ErrorKind.OVERLOADED, "The model's server is busy; try again later.", retry_after_s=1)
                )
            busy = busy or pool.open > 0 or bool(pool.waiters)
        # Engines come back on other ports: what is left of the old ones must not pile up.
        self._pools = {origin: pool for origin, pool in self._pools.items() if pool.open > 0 or pool.waiters}
        self._sweeper = loop.call_later(SWEEP_S, self._sweep) if busy else None
