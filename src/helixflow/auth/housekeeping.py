"""Forgets what is of no use any more: sessions and tokens long over, failures of yesterday, old signing keys."""

from typing import Any, Final

from sqlalchemy import ColumnElement, Table, delete, or_, select

from helixflow.auth.caller import Caller, CallerKind
from helixflow.auth.lockout import tidy_failures
from helixflow.auth.sessions import REFRESH_LIFE_S
from helixflow.auth.signing_key_rotation import SigningKeyRotation
from helixflow.auth.unit import Unit, Units
from helixflow.rpc.access import Access, Level
from helixflow.storage.schema import one_time_tokens, refresh_tokens, sessions

# Sessions that are over may still be asked about.
_SESSIONS_KEPT_S: Final = 30 * 24 * 3600
_ONE_TIME_TOKENS_KEPT_S: Final = 7 * 24 * 3600
# In one transaction: others wait for it.
_BATCH: Final = 1000
_SYSTEM: Final = Caller(CallerKind.SYSTEM, name="housekeeping")
_ACCESS: Final = Access(Level.SERVICE, None, writes=True, idempotent=False)


class SessionHousekeeping:
    """Call `run_once` every few minutes."""

    def __init__(self, units: Units, rotation: SigningKeyRotation) -> None:
        self._units = units
        self._rotation = rotation

    async def run_once(self) -> None:
        """Deletes in batches, until nothing is left to delete. Raises `HelixError` when the database cannot be used."""
        async with self._unit() as unit:
            await tidy_failures(unit)
            await self._rotation.retire(unit)
        while await self._prune_batch() >= _BATCH:
            pass

    async def _prune_batch(self) -> int:
        """How many rows went, of the table of which most did."""
        async with self._unit() as unit:
            return max(
                # A used token that comes again within a day of its end still tells of a theft.
                await _delete(unit, refresh_tokens, refresh_tokens.c.expires_at < unit.now - REFRESH_LIFE_S),
                await _delete(unit, sessions, _is_over(unit.now - _SESSIONS_KEPT_S)),
                await _delete(unit, one_time_tokens, one_time_tokens.c.expires_at < unit.now - _ONE_TIME_TOKENS_KEPT_S),
            )

    def _unit(self) -> Any:
        return self._units.writing(_SYSTEM, _ACCESS, "housekeeping")


def _is_over(before: int) -> ColumnElement[bool]:
    """Sessions that ended before that time and of which no refresh token is left."""
    tokens = select(refresh_tokens.c.session_id).where(refresh_tokens.c.session_id == sessions.c.id).exists()
    return or_(sessions.c.ended_at < before, sessions.c.expires_at < before) & ~tokens


async def _delete(unit: Unit, table: Table, which: ColumnElement[bool]) -> int:
    key = next(iter(table.primary_key))
    some = select(key).where(which).limit(_BATCH)
    return int((await unit.connection.execute(delete(table).where(key.in_(some)))).rowcount)
