"""A raw-socket HTTP/1.1 client: sends exactly the bytes it is given, so that tests see what a library would hide."""

import asyncio
import ssl
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import msgspec

# For each read: only a test that fails waits so long.
LIMIT_S = 60.0


@dataclass(slots=True)
class Answer:
    """A response as it arrived. `pieces` are the chunks of a chunked body; header names are in lower case."""

    status: int
    headers: dict[str, str]
    pieces: list[bytes] = field(default_factory=list)
    complete: bool = True

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The OpenAI-shaped error, checked to have exactly its four fields."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] is None or isinstance(error["code"], str)
        return dict(error)

    @property
    def events(self) -> list[bytes]:
        """The data of the body's SSE events, comments left out."""
        events = [event for event in self.body.split(b"\n\n") if event and not event.startswith(b":")]
        assert all(event.startswith(b"data: ") for event in events), events
        return [event[6:] for event in events]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The events before `[DONE]`, decoded."""
        assert self.events[-1] == b"[DONE]"
        return [msgspec.json.decode(event) for event in self.events[:-1]]


class Wire:
    """One client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: int, context: ssl.SSLContext | None = None) -> "Wire":
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=16 * 2**20, ssl=context))

    async def __aenter__(self) -> "Wire":
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.drop()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def drop(self) -> None:
        """Closes the socket at once, as a process that dies does."""
        self.writer.transport.abort()

    async def closed(self) -> bytes:
        """Waits until the server closes the connection; what came before that."""
        async with asyncio.timeout(LIMIT_S):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    async def read_head(self) -> Answer:
        async with asyncio.timeout(LIMIT_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            assert name.lower() not in headers, f"two headers {name}"
            headers[name.lower()] = value.strip()
        return Answer(int(first.split(" ")[1]), headers)

    async def read_chunk(self) -> bytes | None:
        """The next chunk of a chunked body, `b""` at its end, None when the connection ends before that."""
        async with asyncio.timeout(LIMIT_S):
            try:
                size = int(await self.reader.readuntil(b"\r\n"), 16)
                data = await self.reader.readexactly(size + 2)
            except (asyncio.IncompleteReadError, ConnectionError):
                return None
        return data[:-2]

    async def read(self, *, head_only: bool = False) -> Answer:
        """A whole response."""
        answer = await self.read_head()
        if head_only or answer.status in (100, 204, 304):
            return answer
        if answer.headers.get("transfer-encoding") == "chunked":
            while chunk := await self.read_chunk():
                answer.pieces.append(chunk)
            answer.complete = chunk is not None
        else:
            async with asyncio.timeout(LIMIT_S):
                answer.pieces.append(await self.reader.readexactly(int(answer.headers["content-length"])))
        return answer

    async def ask(self, data: bytes, *, head_only: bool = False) -> Answer:
        self.send(data)
        return await self.read(head_only=head_only)


def request(
    method: str, path: str, body: bytes | None = None, key: str | None = None, headers: dict[str, str] | None = None
) -> bytes:
    """The bytes of a request."""
    lines = [f"{method} {path} HTTP/1.1", "host: test"]
    if key is not None:
        lines.append(f"authorization: Bearer {key}")
    if body is not None:
        lines.append(f"content-length: {len(body)}")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (body or b"")
