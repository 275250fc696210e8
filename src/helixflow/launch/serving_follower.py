"""A process that follows the serving configuration: a gateway, or a pool."""

import asyncio
import secrets
import socket
from collections.abc import Awaitable, Callable
from typing import Final, Literal

import grpc
import structlog

from helixflow.clients.serving import ServingWatch
from helixflow.core.errors import HelixError, UserError
from helixflow.settings.configuration import Models, Refused, read_document

# What could not be done for a reason that passes is tried again.
_RETRY_S: Final = 1.0

log = structlog.get_logger("helixflow.configuration")


class ServingFollower:
    """`run` it while the process serves. `take` serves complete models from then on, or raises `UserError` or
    `HelixError` and leaves everything as it was; after a `HelixError` it is tried again.

    `node` names this one for people; '' takes the host's name.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        service: Literal["gateway", "pool"],
        node: str,
        take: Callable[[Models], Awaitable[None]],
    ) -> None:
        name = node or socket.gethostname()
        self._watch = ServingWatch(channel, secrets.token_hex(8), service, name, self._on_change)
        self._take = take
        self._wanted: tuple[int, bytes] = (0, b"")
        self._awake = asyncio.Event()
        # What is served, 0 for what the process has started with; and why no later one is.
        self._revision = 0
        self._problem = ""

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch.run(), name="serving configuration")
            tasks.create_task(self._follow(), name="changes of the serving configuration")

    def _on_change(self, revision: int, document: bytes) -> None:
        self._wanted = revision, document
        self._awake.set()

    async def _follow(self) -> None:
        while True:
            await self._awake.wait()
            self._awake.clear()
            if not await self._serve(*self._wanted):
                self._awake.set()
                await asyncio.sleep(_RETRY_S)

    async def _serve(self, revision: int, document: bytes) -> bool:
        """False when it is to be tried again."""
        problem, passing = "", False
        try:
            await self._take(await asyncio.to_thread(read_document, document))
        except (Refused, UserError) as exc:
            problem = str(exc)
        except HelixError as exc:
            problem, passing = exc.message, True
        except Exception as exc:
            # A configuration that trips over a fault of ours must not bring down every gateway at once.
            log.error("configuration.failed", revision=revision, exc_info=exc)
            problem = "An internal error; the log of this process says more."
        if not problem:
            self._revision = revision
        elif problem != self._problem:
            log.error("configuration.refused", revision=revision, reason=problem, advice="what was served stays")
        self._problem = problem
        try:
            await self._watch.report(self._revision, problem)
        except HelixError as exc:
            # It is said again when the watch begins anew.
            log.debug("configuration.unreported", code=exc.code)
        return not passing
