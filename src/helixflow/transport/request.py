"""The head of a request, built once per deployment and reused for every call."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from helixflow.transport.origin import Origin

_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110, section 5.6.2
_TARGET: Final = re.compile(r"/[!-~]*")
_UNSAFE: Final = re.compile(r"[\r\n\0]")
_OURS: Final = frozenset({"content-length", "transfer-encoding", "connection", "upgrade"})


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Bounds of one exchange, seconds: opening a connection, silence until the response's head, silence within it."""

    connect_s: float = 5
    first_byte_s: float = 120
    idle_s: float = 60


def build_head(
    method: str, target: str, origin: Origin, headers: Iterable[tuple[str, str]], *, keep_alive: bool = True
) -> bytes:
    """Request line, `Host` and headers, each with its line end, without `content-length` and the final blank line.

    Without `keep_alive` the server is asked to close the connection after its answer.
    A `host` among `headers` replaces the origin's own. Raises `ValueError`, without showing a value, on whatever could
    smuggle or split a request: line breaks, NUL, names that are no tokens, headers that frame the message.
    """
    if not _TOKEN.fullmatch(method):
        raise ValueError(f"{method!r} is not an HTTP method")
    if not _TARGET.fullmatch(target):
        raise ValueError("a request target must begin with / and hold only visible ASCII characters")
    host = origin.authority
    lines: list[str] = [] if keep_alive else ["connection: close\r\n"]
    for name, value in headers:
        if not _TOKEN.fullmatch(name):
            raise ValueError(f"{name!r} is not a header name")
        if _UNSAFE.search(value):
            raise ValueError(f"the header {name!r} has a line break or NUL in its value")
        if name.lower() in _OURS:
            raise ValueError(f"the header {name!r} is set by the HTTP client itself")
        if name.lower() == "host":
            host = value.strip()
        else:
            lines.append(f"{name.lower()}: {value.strip()}\r\n")
    try:
        return f"{method} {target} HTTP/1.1\r\nhost: {host}\r\n{''.join(lines)}".encode("latin-1")
    except UnicodeEncodeError as exc:
        raise ValueError("header values must be Latin-1 text") from exc


def join_request(head: bytes, body: bytes) -> bytes:
    """The whole request in one piece: one write, and with luck one packet."""
    if body or head.startswith((b"POST ", b"PUT ", b"PATCH ")):
        return b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)
    return head + b"\r\n"
