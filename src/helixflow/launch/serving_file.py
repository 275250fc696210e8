"""The configuration file while the node runs: an edited one is read, held against the rules and put in force."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from helixflow.auth.configuration.service import ServingService
from helixflow.core.errors import HelixError, UserError
from helixflow.launch.serving_cache import digest_of
from helixflow.pki.files import Version, version_of
from helixflow.settings.configuration import Refused, document_of
from helixflow.settings.lines import line_of
from helixflow.settings.load import load_settings
from helixflow.settings.tree import Settings

POLL_S: Final = 1.0
# A file that is being written is left alone for so long after it last changed.
_SETTLE_S: Final = 0.1
# What is not a section of its own in the file, or changes while everything runs.
_NOT_COMPARED: Final = frozenset({"data_dir", "models"})

log = structlog.get_logger("helixflow.configuration")


class ConfigurationFile:
    """`follow` it while the node serves. `digest` is that of the models that the file said when it was last taken
    notice of; `on_applied` is told of the next one.
    """

    def __init__(self, path: Path, digest: str, service: ServingService, on_applied: Callable[[str], None]) -> None:
        self._path = path
        self._digest = digest
        self._service = service
        self._on_applied = on_applied
        self._at_start: Settings | None = None
        self._told: tuple[str, ...] = ()
        self._put_off = False

    async def follow(self) -> None:
        """Looks at it once a second, until cancelled. What is wrong with it is logged, once for each change."""
        seen: Version | None = None
        while True:
            version = await asyncio.to_thread(_version_of, self._path)
            if version is None and seen is not None:
                log.warning("configuration.file_gone", file=str(self._path), advice="what is in force stays")
            if version is not None and version != seen and not await self._take_notice(version):
                version = seen
            seen = version
            await asyncio.sleep(POLL_S)

    async def _take_notice(self, version: Version) -> bool:
        """False when it is to be looked at again: it is being written, or nobody can take what it says now."""
        await asyncio.sleep(_SETTLE_S)
        if await asyncio.to_thread(_version_of, self._path) != version:
            return False
        try:
            settings = await asyncio.to_thread(load_settings, self._path)
        except UserError as exc:
            self._refuse(exc.message)
            return True
        self._tell_what_needs_a_restart(settings)
        document = document_of(settings.models)
        if "models" not in settings.model_fields_set or digest_of(document) == self._digest:
            return True
        return await self._apply(document)

    async def _apply(self, document: str) -> bool:
        try:
            version = await self._service.apply_file(document)
        except Refused as exc:
            text = await asyncio.to_thread(self._path.read_text, encoding="utf-8", errors="replace")
            lines = [(line_of(text, problem.location), problem) for problem in exc.problems]
            self._refuse("\n".join(f"{self._path}:{line}: {one}" if line else str(one) for line, one in lines))
            return True
        except HelixError as exc:
            # The database is away, or somebody else was quicker.
            if not self._put_off:
                self._put_off = True
                log.warning("configuration.put_off", file=str(self._path), code=exc.code, reason=exc.message)
            return False
        self._put_off = False
        self._digest = digest_of(document)
        self._on_applied(self._digest)
        log.info("configuration.applied", file=str(self._path), revision=version.revision)
        return True

    def _refuse(self, reason: str) -> None:
        log.error("configuration.refused", file=str(self._path), reason=reason, advice="what is in force stays")

    def _tell_what_needs_a_restart(self, settings: Settings) -> None:
        if self._at_start is None:
            self._at_start = settings
            return
        names = [name for name in Settings.model_fields if name not in _NOT_COMPARED]
        changed = tuple(name for name in names if getattr(settings, name) != getattr(self._at_start, name))
        if changed and changed != self._told:
            log.warning("configuration.restart_needed", file=str(self._path), sections=list(changed))
        self._told = changed


def _version_of(path: Path) -> Version | None:
    """None for what is no file, too: reading a pipe may take for ever."""
    return version_of(path) if path.is_file() else None
