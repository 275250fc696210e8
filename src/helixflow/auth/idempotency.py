"""Answers that are remembered, so that a request that is sent twice is done once."""

import hashlib
import re
from typing import Final

import msgspec
from sqlalchemy import and_, delete, insert, select

from helixflow.auth.sealing import SealedColumn, Sealer
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.storage.engine import Database
from helixflow.storage.schema import idempotency_keys

KEEP_S: Final = 24 * 3600
_FORM: Final = re.compile(r"[!-~]{1,255}")
_PURPOSE: Final = "idempotency"
SEALED: Final = SealedColumn(idempotency_keys.c.response, _PURPOSE)


class _Remembered(msgspec.Struct, array_like=True, frozen=True):
    """`place` is where the operation needed its permission, as `Unit.place`."""

    request_hash: bytes
    place: str | None
    answer: bytes


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(_Remembered)


class Idempotency:
    """Remembers answers for a day, by caller and key.

    Answers may hold secrets, and so may requests: the hash that tells requests apart would let whoever reads the
    database try passwords on it. Both are stored in one sealed value.

    Within a writing unit: of two requests with one key the second waits, and finds the answer of the first.
    """

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    async def find(self, unit: Unit, key: str, request: bytes) -> bytes | None:
        """What was answered to the same caller, key and request; None when it is new.

        `request` is the method and all that was asked. Raises `HelixError` UNPROCESSABLE for a malformed key, or with
        code `idempotency_key_reused` for one that came with another request; PERMISSION_DENIED for a caller who could
        not do it now: the answer may hold a secret.
        """
        if not _FORM.fullmatch(key):
            message = "An idempotency key has 1 to 255 visible ASCII characters."
            raise HelixError(ErrorKind.UNPROCESSABLE, message, param="Idempotency-Key")
        query = select(idempotency_keys).where(
            idempotency_keys.c.caller_id == unit.caller.id,
            idempotency_keys.c.key == key,
            idempotency_keys.c.created_at > unit.now - KEEP_S,
        )
        row = (await unit.connection.execute(query)).first()
        if row is None:
            return None
        remembered = _decoder.decode(self._sealer.open(_PURPOSE, row.response, _context(row.caller_id, key)))
        if remembered.request_hash != _hash(unit, request):
            raise HelixError(
                ErrorKind.UNPROCESSABLE,
                "This idempotency key was used for another request. Take a new one for each request.",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        if remembered.place is not None:
            unit.authorise(remembered.place)
        return remembered.answer

    async def keep(self, unit: Unit, key: str, request: bytes, answer: bytes) -> None:
        """Remembers what was answered to a request for which `find` gave None."""
        caller_id = unit.caller.id
        same = and_(idempotency_keys.c.caller_id == caller_id, idempotency_keys.c.key == key)
        # An old answer that has not been pruned yet.
        await unit.connection.execute(delete(idempotency_keys).where(same))
        remembered = _encoder.encode(_Remembered(_hash(unit, request), unit.place, answer))
        sealed = self._sealer.seal(_PURPOSE, remembered, _context(caller_id, key))
        await unit.connection.execute(
            insert(idempotency_keys).values(caller_id=caller_id, key=key, response=sealed, created_at=unit.now)
        )


async def prune_idempotency_keys(database: Database, now: int) -> None:
    """Forgets what is older than a day. For housekeeping; `now` is seconds since the epoch."""
    async with database.writing() as connection:
        await connection.execute(delete(idempotency_keys).where(idempotency_keys.c.created_at <= now - KEEP_S))


def _hash(unit: Unit, request: bytes) -> bytes:
    """The same words mean another request with a credential for another organisation or project."""
    place = f"{unit.caller.organisation_id}\0{unit.caller.project_id}\0".encode()
    return hashlib.sha256(place + request).digest()


def _context(caller_id: str, key: str) -> str:
    return f"{caller_id}\0{key}"
