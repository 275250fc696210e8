"""The reading side of HTTP/1.1, sans-I/O: bytes in, one response's status, headers and body pieces out."""

from typing import Final

import httptools

MAX_HEAD_BYTES: Final = 64 * 1024


class ResponseError(Exception):
    """The peer does not speak HTTP/1.1, or stopped in the middle of a response."""


class ResponseParser:
    """Parses the responses of one connection, one after the other.

    `start` before each request; then `feed` what arrives, and `finish` at the end of the stream. After each call the
    attributes tell the state: `head_complete` (`status` and `headers` are valid; names in lower case, the last of equal
    names wins, those before it are in `repeated`), `pieces` (decoded body since `start`, to be emptied by the reader),
    `complete` (the response ended) and `reusable` (the connection may carry another request). Interim responses (1xx)
    are skipped.
    """

    __slots__ = (
        "_bodiless",
        "_head_bytes",
        "_interim",
        "_max_head_bytes",
        "_parser",
        "complete",
        "head_complete",
        "headers",
        "pieces",
        "repeated",
        "reusable",
        "status",
    )

    def __init__(self, max_head_bytes: int = MAX_HEAD_BYTES) -> None:
        self._max_head_bytes = max_head_bytes
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self.start()

    def start(self, *, bodiless: bool = False) -> None:
        """Gets ready for the next response; `bodiless` when the request was a HEAD."""
        self._bodiless = bodiless
        self._head_bytes = 0
        self._interim = False
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.repeated: tuple[tuple[bytes, bytes], ...] = ()
        self.pieces: list[bytes] = []
        self.head_complete = False
        self.complete = False
        self.reusable = False

    def release(self) -> None:
        """Ends the parser's life: it and httptools' parser refer to each other."""
        self._parser = None

    def feed(self, data: bytes) -> None:
        """Raises `ResponseError`; bytes beyond the end of a response only make the connection not reusable."""
        parser = self._parser
        if parser is None:
            raise ResponseError("the connection was given up")
        in_head = not self.head_complete
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            raise ResponseError("the server switched to another protocol") from exc
        except httptools.HttpParserError as exc:
            if not self.complete:
                cause = exc.__context__ if isinstance(exc.__context__, ResponseError) else exc
                raise ResponseError(f"not an HTTP response: {cause}") from exc
            self.reusable = False
        if in_head:
            # An upper bound first; only where it exceeds the limit, what the headers really take.
            self._head_bytes += len(data)
            if self._head_bytes > self._max_head_bytes and (not self.head_complete or self._is_head_oversize()):
                raise ResponseError("the response's head is too large")

    def finish(self) -> None:
        """The stream ended: right for a body without length, otherwise raises `ResponseError`."""
        if self.complete:
            return
        if not self.head_complete:
            raise ResponseError("the connection ended before the response")
        coding = self.headers.get(b"transfer-encoding", b"")
        if b"content-length" in self.headers or coding.rstrip().lower().endswith(b"chunked"):
            raise ResponseError("the connection ended within the response")
        self.complete = True

    def on_message_begin(self) -> None:
        if self.complete:
            raise ResponseError("bytes after the end of the response")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head_complete:
            return  # a trailer: nobody reads them
        name = name.lower()
        if name in self.headers:
            self.repeated += ((name, self.headers[name]),)
        self.headers[name] = value.rstrip()

    def on_headers_complete(self) -> None:
        parser = self._parser
        assert parser is not None
        status = parser.get_status_code()
        if status < 200:
            if status == 101:
                raise ResponseError("the server switched to another protocol")
            self._interim = True
            self.headers, self.repeated = {}, ()
            return
        self.status = status
        self.head_complete = True
        if self._bodiless:
            # httptools would wait for the body that content-length announces: the connection ends with this response.
            self.complete = True
            raise ResponseError("the end of a response to HEAD")

    def on_body(self, piece: bytes) -> None:
        self.pieces.append(piece)

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
            return
        parser = self._parser
        assert parser is not None
        self.complete = True
        self.reusable = parser.should_keep_alive()

    def _is_head_oversize(self) -> bool:
        size = sum(len(name) + len(value) for name, value in self.headers.items())
        return size > self._max_head_bytes
