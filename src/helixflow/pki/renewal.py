"""The task that renews the certificates of this node. Whoever uses them follows the files."""

import asyncio
from typing import Final

import structlog

from helixflow.core.errors import UserError
from helixflow.pki.issuing import Issuance
from helixflow.settings.tree import Settings

_LONGEST_PAUSE_S: Final = 60.0
_SHORTEST_PAUSE_S: Final = 0.5

log = structlog.get_logger("helixflow.pki")


class Renewal:
    """Issues what is due, until cancelled. One in a data directory, in the control process; a second does no harm."""

    def __init__(self, settings: Settings) -> None:
        self._issuance = Issuance(settings)
        life_s = settings.pki.certificate_hours * 3600
        self._pause_s = max(_SHORTEST_PAUSE_S, min(_LONGEST_PAUSE_S, life_s / 50))
        self._failure = ""

    async def run(self) -> None:
        while True:
            await asyncio.to_thread(self._renew)
            await asyncio.sleep(self._pause_s)

    def _renew(self) -> None:
        try:
            self._issuance.renew()
        except (UserError, OSError) as exc:
            # It is tried again; told once, for certificates hold a third of their life from here on.
            reason = exc.message if isinstance(exc, UserError) else f"{exc.filename}: {exc.strerror}"
            if reason != self._failure:
                log.error("renewal.failed", reason=reason)
            self._failure = reason
        else:
            self._failure = ""
