"""Comments that keep a waiting stream's connection alive (queue, model load), at most one every ten seconds."""

import asyncio
from collections.abc import Awaitable, Callable

from helixflow.gateway.exchange import Exchange

INTERVAL_S = 10.0
_COMMENT = b": keep-alive\n\n"


class KeepAlive:
    """Armed on creation. If no answer has begun after `INTERVAL_S`, sends the head, then comments until stopped."""

    __slots__ = ("_exchange", "_start", "_task", "_timer")

    def __init__(self, start: Callable[[], Awaitable[None]], exchange: Exchange) -> None:
        self._start = start
        self._exchange = exchange
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(INTERVAL_S, self._begin)

    def _begin(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        await self._start()
        while True:
            await self._exchange.send({"type": "http.response.body", "body": _COMMENT, "more_body": True})
            await asyncio.sleep(INTERVAL_S)

    async def stop(self) -> None:
        """Afterwards nothing more is sent from here. Raises what sending raised."""
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            if not self._task.cancelled() and (error := self._task.exception()) is not None:
                raise error

    def cancel(self) -> None:
        """The same without waiting, when the exchange itself is over."""
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
