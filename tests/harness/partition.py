"""A way to a server that can be cut while others' ways to it stay."""

import asyncio
from contextlib import AsyncExitStack, suppress
from typing import Self


class Way:
    """Listens on loopback, on `port`, and passes on to `target_port` while it is open."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._is_open = True
        self._writers: set[asyncio.StreamWriter] = set()
        self._stack = AsyncExitStack()
        self.port = 0

    async def __aenter__(self) -> Self:
        server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        self._stack.callback(self.cut)
        self._stack.callback(server.close)
        self.port = server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def cut(self) -> None:
        """Whoever is connected is cut off, whoever connects as well."""
        self._is_open = False
        for writer in self._writers:
            writer.transport.abort()

    def heal(self) -> None:
        self._is_open = True

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._is_open:
            writer.transport.abort()
            return
        onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        pair = {writer, onward_writer}
        self._writers |= pair
        await asyncio.gather(_copy(reader, onward_writer), _copy(onward_reader, writer))
        self._writers -= pair


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
