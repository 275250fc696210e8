"""Servers that speak the providers' dialects over a toy model, so that engines can be held against one suite.

The forms follow the public API references: OpenAI's chat completions, Anthropic's Messages, Ollama's own API. The model
counts ("one two three …"), a word a token, and does what the prompt says:

- `weather`: calls the first tool, or as many of them as the prompt says the word; its arguments come in pieces;
- `think`: thinks before it answers;
- `for ever`: never stops by itself;
- `die early`: the connection ends before the first word, `die late`: after some;
- `overload`: refuses as overloaded.
"""

import asyncio
import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

WORDS = ("one", " two", " three", " four", " five", " six", " seven", " eight", " nine", " ten")
# So long a word takes: an endless answer must leave time for others.
PACE_S = 0.002
KEY = "provider-key"


@dataclass(slots=True)
class Asked:
    """A request, whatever its dialect. `position` in the count is where the answer begins; `ids`: tokens are named."""

    prompt: str
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    tools: Sequence[str] = ()
    stream: bool = False
    include_usage: bool = True
    position: int = 0
    ids: bool = False


class Refusal(Exception):
    """An answer with an error status; `body` is in the server's dialect."""

    def __init__(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.status = status
        self.body = body
        self.headers = headers or {}


class Died(Exception):
    """The server breaks off."""


@dataclass(slots=True)
class Usage:
    prompt: int = 0
    completion: int = 0


class ModelServer(ABC):
    """Listens on a loopback port, a free one if none is given, while used as an async context manager.

    `running` counts generations under way, `usage` is that of the last one, `bodies` are the requests.
    """

    def __init__(self, *, context: int = 512, port: int = 0) -> None:
        self.context = context
        self._port = port
        self.running = 0
        self.usage = Usage()
        self.bodies: list[Any] = []
        self._changed = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._handlers: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "ModelServer":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for handler in list(self._handlers):
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def base_url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}{self.base_path}"

    async def become(self, running: int) -> None:
        """Waits until so many generations run."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.running == running)

    # What a dialect is made of.

    base_path = ""

    @abstractmethod
    def check_key(self, headers: dict[str, str]) -> None:
        """Raises `Refusal`."""

    @abstractmethod
    def ask(self, path: str, body: Any) -> Asked | bytes:
        """What is asked, or an answer that needs no model. Raises `Refusal`."""

    @abstractmethod
    def too_long(self, needed: int) -> Refusal: ...

    @abstractmethod
    def overloaded(self) -> Refusal: ...

    @abstractmethod
    def open(self, path: str, asked: Asked) -> "Writer": ...

    # The model.

    async def generate(self, asked: Asked, writer: "Writer") -> AsyncIterator[bytes]:
        prompt = asked.prompt.split()
        self.usage = Usage(len(prompt))
        if len(prompt) + (asked.max_tokens or 0) > self.context:
            raise self.too_long(len(prompt) + (asked.max_tokens or 0))
        if "overload" in prompt:
            raise self.overloaded()
        yield writer.begin(self.usage)
        if "die early" in asked.prompt:
            raise Died
        if "think" in prompt:
            self.usage.completion += 1
            yield writer.think("hmm")
        reason = "stop"
        if asked.tools and (calls := prompt.count("weather")):
            for index in range(calls):
                self.usage.completion += 3
                for piece in writer.call(index, asked.tools[0], '{"city":"Paris"}'):
                    yield piece
            reason = "tool_calls"
        else:
            async for piece in self._count(asked, writer):
                if isinstance(piece, str):
                    reason = piece
                else:
                    yield piece
        yield writer.end(reason, self.usage)

    async def _count(self, asked: Asked, writer: "Writer") -> AsyncIterator[bytes | str]:
        """Pieces, and at last the reason of the end."""
        position = 0
        while "for ever" in asked.prompt or position < len(WORDS):
            if asked.max_tokens is not None and self.usage.completion >= asked.max_tokens:
                yield "length"
                return
            word = WORDS[position % len(WORDS)]
            if any(stop in word for stop in asked.stop):
                break
            if "die late" in asked.prompt and position == 3:
                raise Died
            self.usage.completion += 1
            position += 1
            yield writer.word(word)
            await asyncio.sleep(PACE_S)
        yield "stop"

    # HTTP.

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, Died):
                while True:
                    await self._serve(reader, writer)
        finally:
            self._handlers.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip("\r\n").split("\r\n")
        path = head[0].split(" ")[1].removeprefix(self.base_path)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        raw = await reader.readexactly(int(headers.get("content-length", "0")))
        try:
            self.check_key(headers)
            body = json.loads(raw) if raw else None
            self.bodies.append(body)
            asked = self.ask(path, body)
            if isinstance(asked, bytes):
                _send(writer, 200, asked)
                return
            answer = self.open(path, asked)
            pieces = self.generate(asked, answer)
            first = await anext(pieces)
        except Refusal as refusal:
            _send(writer, refusal.status, json.dumps(refusal.body).encode(), refusal.headers)
            return
        async with self._changed:
            self.running += 1
            self._changed.notify_all()
        gone = asyncio.ensure_future(_gone(reader))
        writing = asyncio.ensure_future(self._write(writer, first, pieces, answer))
        try:
            await asyncio.wait({gone, writing}, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                raise ConnectionResetError
            await writing
        finally:
            for task in (gone, writing):
                task.cancel()
            await asyncio.gather(gone, writing, return_exceptions=True)
            async with self._changed:
                self.running -= 1
                self._changed.notify_all()

    async def _write(
        self, writer: asyncio.StreamWriter, first: bytes, pieces: AsyncIterator[bytes], answer: "Writer"
    ) -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {answer.media_type}\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head.encode())
        _chunk(writer, first)
        async for piece in pieces:
            _chunk(writer, piece)
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()


class Writer(ABC):
    """One answer in a dialect: what each of its parts looks like. A whole answer is all in `end`."""

    media_type = "text/event-stream"

    @abstractmethod
    def begin(self, usage: Usage) -> bytes: ...

    @abstractmethod
    def think(self, text: str) -> bytes: ...

    @abstractmethod
    def word(self, text: str) -> bytes: ...

    @abstractmethod
    def call(self, index: int, name: str, arguments: str) -> Sequence[bytes]: ...

    @abstractmethod
    def end(self, reason: str, usage: Usage) -> bytes: ...


def sse(data: Any, event: str | None = None) -> bytes:
    """One event."""
    return (f"event: {event}\n" if event else "").encode() + b"data: " + json.dumps(data).encode() + b"\n\n"


def halves(text: str) -> tuple[str, str]:
    return text[: len(text) // 2], text[len(text) // 2 :]


def texts_of(content: Any) -> str:
    """The text of a message's content, as a string or in parts."""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "") for part in content or ())


async def _gone(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        await reader.read(1)


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    if data:
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))


def _send(writer: asyncio.StreamWriter, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{lines}\r\n"
    writer.write(head.encode() + body)
