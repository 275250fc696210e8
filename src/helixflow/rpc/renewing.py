"""A channel that changes its certificate without dropping a call: gRPC's own keep theirs for good."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc


class _Line:
    """One inner channel: the calls that run on it, and its stubs by method."""

    def __init__(self, channel: grpc.aio.Channel, version: int) -> None:
        self.channel = channel
        self.version = version
        self.calls = 0
        self.multicallables: dict[tuple[str, str], Any] = {}


class RenewingChannel(grpc.aio.Channel):
    """Calls go to the channel that `connect` made for the present `version()`.

    When the version changes, the next call makes a new one; calls that run on the old one go on, and it is closed when
    the last of them is done. Belongs to one event loop.
    """

    def __init__(self, connect: Callable[[], grpc.aio.Channel], version: Callable[[], int]) -> None:
        self._connect = connect
        self._version = version
        present = version()
        self._line = _Line(connect(), present)
        self._old: set[_Line] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Ends running calls after `grace` seconds, at once by default, those on older inner channels too."""
        self._closed = True
        lines = [self._line, *self._old]
        self._old.clear()
        await asyncio.gather(*(line.channel.close(grace) for line in lines), *self._closing)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._current().channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._current().channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._current().channel.channel_ready()

    def unary_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        return self._multicallable("unary_unary", method, arguments, options)

    def unary_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        return self._multicallable("unary_stream", method, arguments, options)

    def stream_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        return self._multicallable("stream_unary", method, arguments, options)

    def stream_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        return self._multicallable("stream_stream", method, arguments, options)

    def _multicallable(
        self, shape: str, method: str, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Callable[..., Any]:
        def call(*request: Any, **how: Any) -> Any:
            line = self._current()
            multicallable = line.multicallables.get((shape, method))
            if multicallable is None:
                multicallable = getattr(line.channel, shape)(method, *arguments, **options)
                line.multicallables[shape, method] = multicallable
            made = multicallable(*request, **how)
            line.calls += 1
            made.add_done_callback(lambda _call: self._on_done(line))
            return made

        return call

    def _current(self) -> _Line:
        version = self._version()
        if version != self._line.version and not self._closed:
            old, self._line = self._line, _Line(self._connect(), version)
            self._old.add(old)
            self._retire(old)
        return self._line

    def _on_done(self, line: _Line) -> None:
        line.calls -= 1
        self._retire(line)

    def _retire(self, line: _Line) -> None:
        if line.calls == 0 and line in self._old:
            self._old.discard(line)
            task = asyncio.get_running_loop().create_task(line.channel.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
