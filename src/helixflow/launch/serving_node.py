"""The serving configuration on the node of the auth service: written down for the next start, taken from its file."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import msgspec
import structlog

from helixflow.auth.configuration.feed import Serving
from helixflow.auth.configuration.service import ServingService
from helixflow.core.errors import HelixError, UserError
from helixflow.launch.serving_cache import ServingCache, write_cache
from helixflow.launch.serving_file import ConfigurationFile
from helixflow.settings.configuration import Models, complete_document_of
from helixflow.settings.tree import Settings

OnModels = Callable[[Models], Awaitable[None]]

log = structlog.get_logger("helixflow.configuration")


async def ignore_models(_models: Models) -> None:
    """For a node without a pool."""


class ServingNode:
    """`run` it beside the service. `cache` is what the node has started with; `on_models` is told of every change of
    the complete models, one after the other.
    """

    def __init__(self, settings: Settings, cache: ServingCache, service: ServingService, on_models: OnModels) -> None:
        self._settings = settings
        self._cache = cache
        self._service = service
        self._on_models = on_models
        self._digests: asyncio.Queue[str] = asyncio.Queue()
        self._writing = asyncio.Lock()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow(), name="serving configuration")
            if self._cache.config is not None:
                file = ConfigurationFile(
                    Path(self._cache.config), self._cache.file_digest, self._service, self._digests.put_nowait
                )
                tasks.create_task(file.follow(), name="configuration file")
                tasks.create_task(self._note_digests(), name="digests of the configuration file")

    async def _follow(self) -> None:
        async with aclosing(self._service.feed.watch()) as watch:
            async for serving in watch:
                await self._take(serving)

    async def _take(self, serving: Serving) -> None:
        complete = await asyncio.to_thread(complete_document_of, serving.models)
        changed = complete != self._cache.complete
        if changed or (serving.revision, serving.document) != (self._cache.revision, self._cache.document):
            await self._keep(revision=serving.revision, document=serving.document, complete=complete)
        if changed:
            log.info("configuration.in_force", revision=serving.revision, models=len(serving.models))
            try:
                await self._on_models(serving.models)
            except (UserError, HelixError) as exc:
                log.error("configuration.not_served", revision=serving.revision, reason=exc.message)

    async def _note_digests(self) -> None:
        while True:
            await self._keep(file_digest=await self._digests.get())

    async def _keep(self, **fields: object) -> None:
        """A disk that is full does not keep models from being served: the history has them too."""
        self._cache = msgspec.structs.replace(self._cache, **fields)
        try:
            async with self._writing:
                await asyncio.to_thread(write_cache, self._settings, self._cache)
        except UserError as exc:
            log.error("configuration.not_kept", reason=exc.message)
