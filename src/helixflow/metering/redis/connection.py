"""One connection to the server: commands go out together once a turn of the event loop, replies come in their order."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, cast

from helixflow.metering.redis.resp import ErrorReply, Push, Reply, RespError, RespParser, encode_command
from helixflow.metering.redis.scripts import Script

# Beyond that somebody asks faster than the server answers: more would only wait longer.
MAX_PENDING: Final = 20_000

_NO_SCRIPT: Final = "NOSCRIPT"

Answer = asyncio.Future[Reply]
_Pending = tuple[Answer, Script | None, bytes]


class Lost:
    """In place of a reply: the connection was lost before it came. Whether the command was run is not known."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


class RedisConnection(asyncio.Protocol):
    """Answers are futures that never raise: their result is a reply, or `Lost`.

    No answer to the oldest command for `timeout_s`: lost. So it is when the server refuses a command (READONLY, OOM,
    LOADING, a wrong password): all that we ask is needed. `unclaimed` gets answers whose future was cancelled;
    `on_lost` is called once, with the reason, when all answers have their results.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        timeout_s: float,
        *,
        unclaimed: Callable[[Answer, Reply], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._timeout_s = timeout_s
        self._unclaimed = unclaimed
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._parser = RespParser()
        self._out: list[bytes] = []
        self._pending: deque[_Pending] = deque()
        self._sent = 0
        self._answered = 0
        # (number of commands sent, when), once a write.
        self._writes: deque[tuple[int, float]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.lost = ""

    @property
    def pending(self) -> int:
        return len(self._pending)

    @property
    def is_full(self) -> bool:
        return len(self._pending) >= MAX_PENDING

    def command(self, *arguments: bytes) -> Answer:
        return self._send(None, encode_command(*arguments), b"")

    def evaluate(self, script: Script, tail: bytes) -> Answer:
        """Runs a script; `tail` is its encoded number of keys, keys and arguments."""
        return self._send(script, script.evaluate_by_hash, tail)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        pending = self._pending
        try:
            replies = self._parser.feed(data)
        except RespError as exc:
            self.fail(f"the server does not speak RESP: {exc}")
            return
        for reply in replies:
            kind = type(reply)
            if kind is Push:
                continue
            if not pending:
                self.fail("the server answered what was not asked")
                return
            answer, script, tail = pending.popleft()
            self._answered += 1
            if kind is ErrorReply:
                error = cast(ErrorReply, reply)
                if error.code == _NO_SCRIPT and script is not None:
                    # Somebody has emptied the server's memory of scripts; sent in full it is kept again.
                    self._resend(answer, script, tail)
                    continue
                pending.appendleft((answer, None, b""))
                self.fail(error.message)
                return
            if not answer.done():
                answer.set_result(reply)
            elif answer.cancelled():
                self._unclaimed(answer, reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail("the connection was closed" if exc is None else f"the connection was lost: {exc}")

    def close(self) -> None:
        """Of our own will: `on_lost` is not called. Idempotent."""
        self._on_lost = _ignore
        self.fail("closed")

    def fail(self, reason: str) -> None:
        """Gives the connection up. Idempotent."""
        if self.lost:
            return
        self.lost = reason
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        lost = Lost(reason)
        pending, self._pending = self._pending, deque()
        self._out.clear()
        for answer, _, _ in pending:
            if not answer.done():
                answer.set_result(lost)
            elif answer.cancelled():
                self._unclaimed(answer, lost)
        self._on_lost(reason)

    def _send(self, script: Script | None, head: bytes, tail: bytes) -> Answer:
        answer: Answer = self._loop.create_future()
        if self.lost:
            answer.set_result(Lost(self.lost))
            return answer
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(head)
        if tail:
            self._out.append(tail)
        self._pending.append((answer, script, tail))
        self._sent += 1
        return answer

    def _resend(self, answer: Answer, script: Script, tail: bytes) -> None:
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out += (script.evaluate, tail)
        self._pending.append((answer, None, b""))
        self._sent += 1

    def _flush(self) -> None:
        if self.lost or self._transport is None:
            return
        self._writes.append((self._sent, self._loop.time()))
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout_s, self._check)
        self._transport.write(b"".join(self._out))
        self._out.clear()

    def _check(self) -> None:
        """Whether the oldest command has waited too long; looks again when the next could."""
        self._timer = None
        writes, answered = self._writes, self._answered
        while writes and writes[0][0] <= answered:
            writes.popleft()
        if not writes:
            return
        due = writes[0][1] + self._timeout_s
        now = self._loop.time()
        if due <= now:
            self.fail(f"no answer for {self._timeout_s:g} s")
        else:
            self._timer = self._loop.call_at(due, self._check)


def _ignore(_reason: str) -> None:
    """Who closes it knows."""
