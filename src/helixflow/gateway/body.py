"""Reading request bodies within bounds of size, time and encoding."""

import zlib

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.gateway.exchange import ClientGone, Exchange

_NOT_JSON = (b"multipart/", b"image/", b"audio/", b"video/", b"text/html", b"text/xml", b"application/xml")
_INFLATE_STEP = 256 * 1024


def body_at_hand(exchange: Exchange, *, max_bytes: int) -> bytes | None:
    """The whole body where it has come in with its head, as plain JSON; None: `read_body` will see."""
    headers = exchange.headers
    if headers.get(b"content-type") != b"application/json" or b"content-encoding" in headers:
        return None
    body = exchange.take_body()
    if body is not None and len(body) > max_bytes:
        raise _too_large(max_bytes)
    return body


async def read_body(exchange: Exchange, *, max_bytes: int) -> bytes:
    """The whole body, decompressed.

    Raises `HelixError`: BODY_TOO_LARGE before it is read whole, REQUEST_TIMEOUT (from `receive`) when it is too slow,
    UNSUPPORTED_MEDIA_TYPE for what is clearly not JSON or an unknown encoding; `ClientGone`.
    """
    headers = exchange.headers
    length = headers.get(b"content-length")
    if length is not None and int(length) > max_bytes:
        raise _too_large(max_bytes)
    content_type = headers.get(b"content-type", b"").lstrip().lower()
    if content_type.startswith(_NOT_JSON):
        raise HelixError(
            ErrorKind.UNSUPPORTED_MEDIA_TYPE, "Send the request body as JSON with 'Content-Type: application/json'."
        )
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"identity", b"gzip"):
        raise HelixError(ErrorKind.UNSUPPORTED_MEDIA_TYPE, "Only 'Content-Encoding: gzip' or none is supported.")
    body = await read_whole(exchange, max_bytes=max_bytes)
    return body if encoding == b"identity" else _inflate(body, max_bytes)


async def read_whole(exchange: Exchange, *, max_bytes: int) -> bytes:
    """The whole body as it came, whatever it is. Raises `HelixError` BODY_TOO_LARGE, REQUEST_TIMEOUT; `ClientGone`."""
    length = exchange.headers.get(b"content-length")
    if length is not None and int(length) > max_bytes:
        raise _too_large(max_bytes)
    message = await exchange.receive()
    if message["type"] == "http.disconnect":
        raise ClientGone
    body: bytes = message["body"]
    if message.get("more_body"):
        body = await _read_rest(exchange, body, max_bytes)
    elif len(body) > max_bytes:
        raise _too_large(max_bytes)
    return body


async def _read_rest(exchange: Exchange, first: bytes, max_bytes: int) -> bytes:
    pieces, size = [first], len(first)
    more = True
    while more and size <= max_bytes:
        message = await exchange.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        pieces.append(message["body"])
        size += len(message["body"])
        more = message.get("more_body", False)
    if size > max_bytes:
        raise _too_large(max_bytes)
    return b"".join(pieces)


def _inflate(body: bytes, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj(wbits=31)
    pieces, size = [], 0
    try:
        while body and not inflater.eof:
            piece = inflater.decompress(body, _INFLATE_STEP)
            body = inflater.unconsumed_tail
            pieces.append(piece)
            size += len(piece)
            if size > max_bytes:
                raise _too_large(max_bytes)
    except zlib.error as exc:
        raise HelixError(ErrorKind.INVALID_REQUEST, "The request body is not valid gzip data.") from exc
    if not inflater.eof:
        raise HelixError(ErrorKind.INVALID_REQUEST, "The gzip data of the request body is cut short.")
    return b"".join(pieces)


def _too_large(max_bytes: int) -> HelixError:
    return HelixError(ErrorKind.BODY_TOO_LARGE, f"The request body is larger than the limit of {max_bytes} bytes.")
