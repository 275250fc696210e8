"""What of a request's head is looked at as bytes."""

import re
from urllib.parse import unquote

import httptools

_UPGRADE = re.compile(rb"(?im)^upgrade:")


def without_upgrade(data: bytes) -> bytes:
    """A head without the offer to upgrade, which may be ignored (RFC 9110, section 7.8): Java's client makes one on
    each plain connection, and the parser would give up the body.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"x-upgrade:", head) + end + rest


def split_target(target: bytes) -> tuple[str, bytes]:
    """Path (decoded) and query of a request target. Raises `httptools.HttpParserInvalidURLError` for nonsense."""
    if target.startswith(b"/") and b"?" not in target and b"#" not in target:
        path, query = target.decode("ascii"), b""
    else:
        url = httptools.parse_url(target)
        path, query = (url.path or b"/").decode("ascii"), url.query or b""
    return (unquote(path) if "%" in path else path), query
