"""One connection through the data port: TLS towards a gateway, plain towards an engine, and nothing kept in between.

TLS is done here over memory buffers rather than by the event loop: a gateway that drops its socket is noticed with the
next turn of the loop, whatever the state of TLS, and the engine's socket is dropped at once. That is what frees a slot.
"""

import asyncio
import ssl
from enum import Enum
from typing import Final, Protocol, cast

_READ_BYTES: Final = 1 << 16
# What is on its way in one direction while the other side does not read: enough for one turn of the loop.
_HIGH_WATER: Final = 1 << 18
# An answer whose engine is done may take so long to be read.
_LINGER_S: Final = 30.0


class NamedObject(ssl.SSLObject):
    """TLS of one connection that remembers which server name was asked for."""

    wanted: str = ""


def note_server_names(context: ssl.SSLContext) -> None:
    """Has connections with `context` be `NamedObject`s. An unknown name is refused later, to those we trust only."""

    def note(tls: ssl.SSLObject | ssl.SSLSocket, name: str | None, _context: ssl.SSLContext) -> None:
        cast(NamedObject, tls).wanted = (name or "").lower()

    context.sslobject_class = NamedObject
    context.sni_callback = note


class TunnelOwner(Protocol):
    """Who lets tunnels through, and is told of each one's end."""

    def admit(self, tunnel: "Tunnel", certificate: bytes, server_name: str) -> None:
        """The handshake is done with this certificate (DER). Answers later: `connect` or `drop`. Never raises."""
        ...

    def ended(self, tunnel: "Tunnel") -> None:
        """Its sockets are closed or closing. Called once."""
        ...


class _State(Enum):
    HANDSHAKE = 0
    WAITING = 1
    OPEN = 2
    FINISHING = 3
    CLOSED = 4


class Tunnel(asyncio.Protocol):
    """The side towards the gateway, and owner of the side towards the engine.

    `was_open` once both were joined; `reason` says why it ended. `serial` is that of the gateway's certificate, kept
    for the owner.
    """

    def __init__(self, owner: TunnelOwner, context: ssl.SSLContext, handshake_timeout_s: float) -> None:
        self._owner = owner
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._timeout_s = handshake_timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._engine: asyncio.Transport | None = None
        self._state = _State.HANDSHAKE
        self.was_open = False
        self.reason = ""
        self.serial = 0

    async def connect(self, host: str, port: int) -> None:
        """Joins it with an engine. Raises `OSError` when that does not listen."""
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: _EngineSide(self), host, port)
        if self._state is not _State.WAITING or self._transport is None:
            transport.abort()
            return
        self._engine = transport
        transport.set_write_buffer_limits(_HIGH_WATER)
        self._stop_timer()
        self._state = _State.OPEN
        self.was_open = True
        self._transport.resume_reading()
        self._decrypt()  # a request may have come together with the end of the handshake

    def drop(self, reason: str = "") -> None:
        """Aborts both sockets. Idempotent."""
        if self._state is _State.CLOSED:
            return
        self._state = _State.CLOSED
        self.reason = reason
        self._stop_timer()
        for transport in (self._transport, self._engine):
            if transport is not None:
                transport.abort()
        self._owner.ended(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._transport.set_write_buffer_limits(_HIGH_WATER)
        self._start_timer(self._timeout_s, "slow handshake")

    def data_received(self, data: bytes) -> None:
        self._incoming.write(data)
        if self._state is _State.OPEN:
            self._decrypt()
        elif self._state is _State.HANDSHAKE:
            self._shake_hands()

    def eof_received(self) -> None:
        self.drop("left")

    def connection_lost(self, exc: Exception | None) -> None:
        self.drop("left")
        self._transport = None

    def pause_writing(self) -> None:
        if self._engine is not None:
            self._engine.pause_reading()

    def resume_writing(self) -> None:
        if self._engine is not None and not self._engine.is_closing():
            self._engine.resume_reading()

    def take(self, data: bytes) -> None:
        """A piece of the engine's answer."""
        if self._state is _State.OPEN:
            self._tls.write(data)
            self._flush()

    def finish(self) -> None:
        """The engine has said its last: the gateway gets what is on its way, and then the end."""
        if self._state is not _State.OPEN:
            return
        self._state = _State.FINISHING
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # the farewell is written; nobody waits for the answer to it
        self._flush()
        # The gateway closes once it has read the farewell: uvloop loses what is unread when the socket ends before.
        self._start_timer(_LINGER_S, "")

    def hold(self) -> None:
        """The engine takes no more for now. A gateway that leaves meanwhile is noticed once it does again."""
        if self._transport is not None:
            self._transport.pause_reading()

    def go_on(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError:
            self._flush()  # says why, in TLS's own words
            self.drop("handshake")
            return
        self._flush()
        self._state = _State.WAITING
        assert self._transport is not None
        self._transport.pause_reading()
        certificate = self._tls.getpeercert(binary_form=True)
        self._owner.admit(self, certificate or b"", cast(NamedObject, self._tls).wanted)

    def _decrypt(self) -> None:
        engine = self._engine
        assert engine is not None
        while self._state is _State.OPEN:
            try:
                data = self._tls.read(_READ_BYTES)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLError:
                data = b""
            if not data:
                self.drop("left")
                return
            engine.write(data)
        self._flush()

    def _flush(self) -> None:
        if self._transport is not None and (data := self._outgoing.read()):
            self._transport.write(data)

    def _start_timer(self, seconds: float, reason: str) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self.drop, reason)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _EngineSide(asyncio.Protocol):
    def __init__(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel

    def data_received(self, data: bytes) -> None:
        self._tunnel.take(data)

    def pause_writing(self) -> None:
        self._tunnel.hold()

    def resume_writing(self) -> None:
        self._tunnel.go_on()

    def eof_received(self) -> None:
        self._tunnel.finish()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None:
            self._tunnel.finish()
        else:
            self._tunnel.drop()
