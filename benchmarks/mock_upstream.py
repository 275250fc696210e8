"""A very cheap OpenAI-compatible upstream: `python -m benchmarks.mock_upstream --port 0`; prints the port it took.

The model's name chooses the behaviour: `mock` answers at once, `mock-paced` sends 50 events/s a stream, `mock-idle`
sends the role event and one word and then nothing, `mock-silent` not even the word. Streams have 31 content events, or
`max_tokens` of them.
"""

import argparse
import asyncio
import re
import sys
from collections.abc import Iterator

import httptools
import uvloop

from benchmarks.processes import pin

CONTENT_EVENTS = 31
PACE_S = 0.02
# Paced streams are served in turns, so that one timer does for all of them.
SLOTS = 20

BODY = (
    b'{"id":"chatcmpl-mock-000000000001","object":"chat.completion","created":1763800000,"model":"mock","choices":['
    b'{"index":0,"message":{"role":"assistant","content":"The capital of France is Paris, a city on the Seine with '
    b'two million people.","refusal":null},"logprobs":null,"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":24,"completion_tokens":18,"total_tokens":42,"prompt_tokens_details":{"cached_tokens":0}},"system_fingerprint":"fp_mock"}'
)
MODELS = b'{"object":"list","data":[{"id":"mock","object":"model","created":1763800000,"owned_by":"mock"}]}'


def _plain(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


def _event(choices: bytes, rest: bytes = b"") -> bytes:
    data = (
        b'data: {"id":"chatcmpl-mock-000000000001","object":"chat.completion.chunk","created":1763800000,'
        b'"model":"mock","choices":[%b]%b}\n\n' % (choices, rest)
    )
    return b"%x\r\n%b\r\n" % (len(data), data)


ANSWER = _plain(BODY)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
ROLE = _event(b'{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}')
CONTENT = _event(b'{"index":0,"delta":{"content":" word"},"finish_reason":null}')
FINISH = _event(b'{"index":0,"delta":{},"finish_reason":"stop"}')
USAGE = _event(b"", b',"usage":{"prompt_tokens":24,"completion_tokens":31,"total_tokens":55}')
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"

_STREAM = re.compile(rb'"stream"\s*:\s*true')
_USAGE = re.compile(rb'"include_usage"\s*:\s*true')
_MODEL = re.compile(rb'"model"\s*:\s*"(mock[a-z-]*)"')
_MAX_TOKENS = re.compile(rb'"max_(?:completion_)?tokens"\s*:\s*(\d+)')


def events(body: bytes) -> Iterator[bytes]:
    """The pieces of a streamed answer, one event each; the head goes with the first one."""
    yield STREAM_HEAD + ROLE
    limit = _MAX_TOKENS.search(body)
    for _ in range(int(limit[1]) if limit else CONTENT_EVENTS):
        yield CONTENT
    yield FINISH
    if _USAGE.search(body):
        yield USAGE
    yield DONE


class Pacer:
    """Gives every paced stream one event each `PACE_S`, the streams spread evenly over that time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._slots: list[set[Upstream]] = [set() for _ in range(SLOTS)]
        self._next_slot = 0
        self._turn = 0
        self._started = loop.time()
        loop.call_soon(self._tick)

    def add(self, upstream: "Upstream") -> None:
        self._slots[self._next_slot % SLOTS].add(upstream)
        self._next_slot += 1

    def _tick(self) -> None:
        slot = self._slots[self._turn % SLOTS]
        slot.difference_update([upstream for upstream in slot if not upstream.send_next()])
        self._turn += 1
        self._loop.call_at(self._started + self._turn * PACE_S / SLOTS, self._tick)


class Upstream(asyncio.Protocol):
    """One connection."""

    def __init__(self, pacer: Pacer, loop: asyncio.AbstractEventLoop) -> None:
        self._pacer = pacer
        self._loop = loop
        self._url = b""
        self._body: list[bytes] = []
        self._events: Iterator[bytes] = iter(())
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = []
        if self._transport is None:
            return
        if not self._url.endswith(b"/chat/completions"):
            found = self._url.endswith((b"/models", b"/health"))
            self._transport.write(_plain(MODELS) if found else _plain(b'{"error":{"message":"?"}}', b"404 Not Found"))
        elif not _STREAM.search(body):
            self._transport.write(ANSWER)
        else:
            self._stream(body)

    def _stream(self, body: bytes) -> None:
        model = _MODEL.search(body)
        name = model[1] if model else b"mock"
        self._events = events(body)
        if name == b"mock-silent":
            self.send_next()
        elif name == b"mock-idle":
            self.send_next()
            self.send_next()
        elif name == b"mock-paced":
            self._pacer.add(self)
        else:
            self._send_all()

    def _send_all(self) -> None:
        """One event an iteration of the loop, as from a server that writes each token by itself."""
        if self.send_next():
            self._loop.call_soon(self._send_all)

    def send_next(self) -> bool:
        """Sends the next event; False when there is none or the client has left."""
        if self._transport is None:
            return False
        piece = next(self._events, b"")
        self._transport.write(piece)
        return bool(piece)


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    pacer = Pacer(loop)
    server = await loop.create_server(lambda: Upstream(pacer, loop), "127.0.0.1", port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--core", type=int)
    arguments = parser.parse_args()
    pin(arguments.core)
    uvloop.run(serve(arguments.port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
