"""The launcher's Unix socket: JSON lines in, a reply a line and events out. Small, bounded, never blocking."""

import contextlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from helixflow.process.loop import Loop

MAX_REQUEST_BYTES: Final = 1 << 20
MAX_PENDING_BYTES: Final = 8 << 20
MAX_CONNECTIONS: Final = 32

Request = dict[str, Any]
Respond = Callable[[Request], Request]


class RequestSocket:
    """Listens on `path` (mode 0600). `respond` turns a request into the fields of its reply.

    A reply is `{"id": …, "ok": true, …}`, or `{"id": …, "ok": false, "error": "…"}` where `respond` raised `ValueError`
    or `OSError` or the line was no JSON object. Events carry no id and go to every connection. A peer that sends
    too long a line, or reads so little that its unread replies pile up, is disconnected.
    """

    def __init__(self, loop: Loop, path: Path, respond: Respond) -> None:
        self._loop = loop
        self._path = path
        self._respond = respond
        self._connections: set[_Connection] = set()
        self._listener = _listen(path)
        loop.watch(self._listener.fileno(), self._accept)

    def broadcast(self, event: Request) -> None:
        for connection in tuple(self._connections):
            connection.send(event)

    def close(self) -> None:
        """Ends all connections and removes the socket file."""
        for connection in tuple(self._connections):
            connection.close()
        self._loop.watch(self._listener.fileno())
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError:
            # The peer is gone already, or descriptors ran out: the loop comes back while somebody waits.
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            peer.close()
            return
        self._connections.add(_Connection(self._loop, peer, self._respond, self._connections.discard))


class _Connection:
    def __init__(
        self, loop: Loop, peer: socket.socket, respond: Respond, on_close: Callable[["_Connection"], None]
    ) -> None:
        peer.setblocking(False)
        self._loop = loop
        self._peer = peer
        self._respond = respond
        self._on_close = on_close
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._closed = False
        self._rewatch()

    def send(self, message: Request) -> None:
        if self._closed:
            return
        self._outgoing += json.dumps(message, separators=(",", ":")).encode() + b"\n"
        if len(self._outgoing) > MAX_PENDING_BYTES:
            self.close()
        else:
            self._flush()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.watch(self._peer.fileno())
            self._peer.close()
            self._on_close(self)

    def _rewatch(self) -> None:
        self._loop.watch(self._peer.fileno(), self._receive, self._flush if self._outgoing else None)

    def _receive(self) -> None:
        try:
            data = self._peer.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._incoming += data
        *lines, rest = self._incoming.split(b"\n")
        self._incoming = rest
        for line in lines:
            self.send(self._reply(bytes(line)))
        if len(self._incoming) > MAX_REQUEST_BYTES:
            self.send({"id": None, "ok": False, "error": f"a request is at most {MAX_REQUEST_BYTES} bytes"})
            self.close()

    def _reply(self, line: bytes) -> Request:
        try:
            request = json.loads(line)
        except ValueError as exc:
            return {"id": None, "ok": False, "error": f"not JSON: {exc}"}
        if not isinstance(request, dict):
            return {"id": None, "ok": False, "error": "a request is a JSON object"}
        identity = request.get("id")
        try:
            return {"id": identity, "ok": True, **self._respond(request)}
        except (ValueError, OSError) as exc:
            return {"id": identity, "ok": False, "error": str(exc)}

    def _flush(self) -> None:
        if self._closed:
            return
        with contextlib.suppress(BlockingIOError):
            try:
                while self._outgoing:
                    del self._outgoing[: self._peer.send(self._outgoing)]
            except (BrokenPipeError, ConnectionResetError):
                self.close()
                return
        self._rewatch()


def _listen(path: Path) -> socket.socket:
    """Replaces a socket file that a killed launcher left; the caller holds the data directory's lock."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(16)
    listener.setblocking(False)
    return listener
