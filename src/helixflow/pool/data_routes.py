"""Which engine a server name on the data port means: asked of the launcher, which knows what runs."""

import asyncio
from typing import Final

from helixflow.core.errors import HelixError
from helixflow.pki.names import replica_server_name
from helixflow.pool.launcher_client import EngineExit, Engines, RunningEngine

# Names that nobody has must not keep the launcher busy.
_LOOK_EVERY_S: Final = 0.1


class DataRoutes:
    """Ports of engines by the server names of their replicas.

    The launcher and not the pool is asked: it is there while the pool is being started again, and what it does not
    run, nobody serves. It is asked when a name is not known, that is once for each replica.
    """

    def __init__(self, engines: Engines, trust_domain: str) -> None:
        self._engines = engines
        self._trust_domain = trust_domain
        self._ports: dict[str, int] = {}
        self._look: asyncio.Future[None] | None = None
        self._looked_at = float("-inf")

    async def find(self, server_name: str) -> int | None:
        """The loopback port; None when no engine has that name. Raises `HelixError` (UNAVAILABLE)."""
        port = self._ports.get(server_name)
        if port is None:
            await self._refresh()
            port = self._ports.get(server_name)
        return port

    async def _refresh(self) -> None:
        """One look serves all who wait for one."""
        loop = asyncio.get_running_loop()
        if self._look is None:
            self._look = loop.create_task(self._take_look(loop))
        await asyncio.shield(self._look)

    async def _take_look(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            await asyncio.sleep(self._looked_at + _LOOK_EVERY_S - loop.time())
            self._looked_at = loop.time()
            for engine in await self._engines.list():
                self._learn(engine)
        finally:
            self._look = None

    def _learn(self, engine: RunningEngine) -> None:
        port = engine.meta.get("port")
        name = replica_server_name(self._trust_domain, engine.name)
        if not isinstance(port, int) or engine.exited.done() or name in self._ports:
            return
        self._ports[name] = port
        engine.exited.add_done_callback(lambda exited: self._forget(name, exited))

    def _forget(self, name: str, exited: "asyncio.Future[EngineExit]") -> None:
        self._ports.pop(name, None)
        if not exited.cancelled() and isinstance(exited.exception(), HelixError):
            self._ports.clear()  # the launcher is lost, and with it everything
