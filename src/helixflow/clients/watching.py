"""The loop around a server's stream that must always be there: open, read, and open again when it breaks."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final, TypeVar

import grpc
import structlog

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.process.backoff import Backoff
from helixflow.rpc.errors import from_rpc_error

Message = TypeVar("Message")

FIRST_MESSAGE_TIMEOUT_S: Final = 5.0
# Every call has a deadline, a watch too: it is opened anew once an hour. Silence in between is watched by keepalive.
STREAM_DEADLINE_S: Final = 3600.0

log = structlog.get_logger("helixflow.clients")


class Watch:
    """Keeps one server stream open, with backoff and jitter between attempts. Ends only by being cancelled.

    `open_stream(timeout)` makes the call, `on_message` gets each message and whether it is the stream's first,
    `on_lost` is called when a stream that had begun has broken. Both must not block.
    """

    def __init__(
        self,
        name: str,
        open_stream: Callable[[float], Any],
        on_message: Callable[[Any, bool], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._name = name
        self._open_stream = open_stream
        self._on_message = on_message
        self._on_lost = on_lost
        # What changes once the service is back must be seen within a second of it: see `MAX_RECONNECT_BACKOFF_S` too.
        self._backoff = Backoff(initial_s=0.05, maximum_s=0.25, jitter=0.5)
        self._failing = False
        self._has_stood = False

    async def run(self) -> None:
        while True:
            try:
                await self._follow()
            except HelixError as exc:
                # Once for each outage: an attempt a second would bury everything else.
                if not self._failing:
                    self._failing = True
                    # At the start the services come up in any order.
                    note = log.warning if self._has_stood else log.debug
                    note("watch.lost", watch=self._name, code=exc.code, reason=exc.message)
            await asyncio.sleep(self._backoff.next_delay_s(0))

    async def _follow(self) -> None:
        begun = False
        try:
            async with aclosing(_messages(self._open_stream(STREAM_DEADLINE_S))) as messages:
                async for message in messages:
                    self._on_message(message, not begun)
                    if not begun:
                        begun = True
                        self._begin()
        finally:
            if begun:
                self._on_lost()

    def _begin(self) -> None:
        self._backoff.reset()
        if self._failing and self._has_stood:
            log.info("watch.restored", watch=self._name)
        self._failing = False
        self._has_stood = True


async def _messages(stream: Any) -> AsyncGenerator[Any, None]:
    """The messages of a call; the first must come soon. Raises `HelixError`; the call is ended in any case."""
    try:
        iterator = stream.__aiter__()
        # Not `wait_for`: until Python 3.12 it loses a cancellation that comes together with an error.
        async with asyncio.timeout(FIRST_MESSAGE_TIMEOUT_S):
            first = await anext(iterator, None)
        if first is None:
            raise HelixError(ErrorKind.UNAVAILABLE, "The stream ended before it began.")
        yield first
        async for message in iterator:
            yield message
    except TimeoutError as exc:
        raise HelixError(ErrorKind.DEADLINE, "The stream did not begin in time.") from exc
    except grpc.RpcError as exc:
        error = from_rpc_error(exc)
        if error.kind is not ErrorKind.DEADLINE:
            raise error from exc
    finally:
        stream.cancel()
