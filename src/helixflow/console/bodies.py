"""Request bodies, before anything looks into them: within bounds of size, time and depth, and strictly JSON."""

import asyncio
from typing import Final

import msgspec
from fastapi import Request

from helixflow.core.errors import ErrorKind, HelixError

MAX_BYTES: Final = 2**20
MAX_DEPTH: Final = 64
READ_TIMEOUT_S: Final = 30.0


async def read_body(request: Request, *, max_bytes: int = MAX_BYTES, timeout_s: float = READ_TIMEOUT_S) -> bytes:
    """The whole body, checked by `check_json`; b'' when there is none.

    Raises `HelixError`: BODY_TOO_LARGE before it is read whole, UNSUPPORTED_MEDIA_TYPE, REQUEST_TIMEOUT, INVALID_JSON,
    INVALID_VALUE; `ClientDisconnect`.
    """
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)
    pieces, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                pieces.append(piece)
                size += len(piece)
                if size > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError as exc:
        raise HelixError(ErrorKind.REQUEST_TIMEOUT, "The request body did not come in time.") from exc
    body = b"".join(pieces)
    if body:
        check_media_type(request.headers.get("content-type", ""), request.headers.get("content-encoding", "identity"))
        check_json(body)
    return body


def check_media_type(content_type: str, encoding: str) -> None:
    """Raises `HelixError` UNSUPPORTED_MEDIA_TYPE unless it is plain JSON in UTF-8."""
    media_type, _, parameters = content_type.partition(";")
    charset = parameters.strip().lower().replace('"', "").removeprefix("charset=")
    if media_type.strip().lower() != "application/json" or charset not in ("", "utf-8", "utf8"):
        raise HelixError(
            ErrorKind.UNSUPPORTED_MEDIA_TYPE, "Send the request body as JSON with 'Content-Type: application/json'."
        )
    if encoding.strip().lower() != "identity":
        raise HelixError(ErrorKind.UNSUPPORTED_MEDIA_TYPE, "Send the request body without 'Content-Encoding'.")


def check_json(body: bytes) -> None:
    """Raises `HelixError` for what is not JSON (RFC 8259) in UTF-8, and for what no field of ours could mean: NUL
    characters, which databases refuse, and deep nesting, which costs.
    """
    try:
        value = msgspec.json.decode(body)
    except RecursionError as exc:
        raise _too_deep() from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        # Not chained: the text of some of these holds a piece of the body.
        position = f" ({found})" if (found := _position_of(exc)) else ""
        raise HelixError(ErrorKind.INVALID_JSON, f"The request body is not valid JSON{position}.") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = _inside(level)
        if not level:
            return
    raise _too_deep()


def _inside(values: list[object]) -> list[object]:
    """What lies one level deeper. Raises `HelixError` for a text with NUL."""
    deeper: list[object] = []
    for value in values:
        if isinstance(value, dict):
            deeper += value.keys()
            deeper += value.values()
        elif isinstance(value, list):
            deeper += value
        elif isinstance(value, str) and "\0" in value:
            raise HelixError(ErrorKind.INVALID_VALUE, "The request body holds NUL characters.")
    return deeper


def _position_of(exc: Exception) -> str:
    """`byte 12`, where the decoder said so."""
    if isinstance(exc, UnicodeDecodeError):
        return "not UTF-8"
    _, found, rest = str(exc).rpartition("(byte ")
    return f"byte {rest.rstrip(')')}" if found else ""


def _too_large(max_bytes: int) -> HelixError:
    return HelixError(ErrorKind.BODY_TOO_LARGE, f"The request body is larger than {max_bytes} bytes.")


def _too_deep() -> HelixError:
    return HelixError(ErrorKind.INVALID_JSON, f"The request body is nested deeper than {MAX_DEPTH} levels.")
