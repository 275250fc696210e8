"""The keys that access tokens are signed with: which one signs now, and which ones are accepted.

All is in the database, private halves sealed, and is looked up there for each token: control processes need not talk.
"""

import asyncio
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_private_key, load_der_public_key
from sqlalchemy import Row, Select, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.sealing import SealedColumn, Sealer
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import identity_pb2
from helixflow.storage.engine import Database
from helixflow.storage.schema import signing_keys

# Of the keys of this module among all rows of the table, and of what is sealed.
PURPOSE: Final = "token"
SEAL: Final = "signing_key"
SEALED: Final = SealedColumn(signing_keys.c.private_key, SEAL, only=signing_keys.c.purpose == PURPOSE)
_FIRST_KEY_WAIT_S: Final = 20.0
_POLL_S: Final = 0.2


class SigningKeys:
    """Reads them. `signing_key_rotation` makes and retires them."""

    def __init__(self, database: Database, sealer: Sealer, clock: Clock) -> None:
        self._database = database
        self._sealer = sealer
        self._clock = clock
        self._accepted: Mapping[str, RSAPublicKey] = {}
        # The one that signs and the one that follows.
        self._opened = lru_cache(maxsize=4)(self._open)

    async def ready(self) -> None:
        """Waits until there is one to sign with: after the very first start that takes seconds.

        Raises `HelixError` UNAVAILABLE when it does not come in time.
        """
        try:
            async with asyncio.timeout(_FIRST_KEY_WAIT_S):
                # Another process may be the one that makes it: only the database knows.
                while True:
                    if await self._database.fetch_one(signing(int(self._clock.now()))) is not None:
                        return
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as exc:
            raise _no_key() from exc

    async def choose(self, connection: AsyncConnection, now: int) -> tuple[str, RSAPrivateKey]:
        """The `kid` of the key that signs at `now`, and the key. Raises `HelixError` UNAVAILABLE when there is none."""
        row = (await connection.execute(signing(now))).first()
        if row is None:
            raise _no_key()
        return row.kid, self._opened(row.kid, row.private_key)

    async def public_keys(self) -> list[identity_pb2.SigningKey]:
        """All that tokens may be signed with, now or soon, as gateways are told. Oldest first."""
        return [_describe(row.kid, public_key(row.public_key)) for row in await self._database.fetch_all(self._query())]

    async def refresh(self) -> None:
        """Looks up which keys `accepted` knows."""
        rows: Sequence[Row[Any]] = await self._database.fetch_all(self._query())
        # Parsing costs more than looking; what a name stands for never changes.
        known = self._accepted
        self._accepted = {row.kid: known.get(row.kid) or public_key(row.public_key) for row in rows}

    def accepted(self, kid: str) -> RSAPublicKey | None:
        """The key of that name, as of the last `refresh`."""
        return self._accepted.get(kid)

    def _query(self) -> "Select[Any]":
        live = or_(signing_keys.c.expires_at.is_(None), signing_keys.c.expires_at > int(self._clock.now()))
        return (
            select(signing_keys.c.kid, signing_keys.c.public_key)
            .where(signing_keys.c.purpose == PURPOSE, live)
            .order_by(signing_keys.c.created_at, signing_keys.c.kid)
        )

    def _open(self, kid: str, sealed: bytes) -> RSAPrivateKey:
        # The seal vouches for it: checking the numbers would take 0.3 s, with the interpreter's lock held.
        key = load_der_private_key(
            self._sealer.open(SEAL, sealed, kid), password=None, unsafe_skip_rsa_key_validation=True
        )
        assert isinstance(key, RSAPrivateKey)
        return key


def signing(now: int) -> "Select[Any]":
    """Selects the row of the key that signs at `now`: the latest that has become active."""
    return (
        select(signing_keys)
        .where(
            signing_keys.c.purpose == PURPOSE,
            signing_keys.c.active_at <= now,
            signing_keys.c.private_key.is_not(None),
        )
        .order_by(signing_keys.c.active_at.desc(), signing_keys.c.kid.desc())
        .limit(1)
    )


def public_key(der: bytes) -> RSAPublicKey:
    """The public half as it is stored."""
    key = load_der_public_key(der)
    assert isinstance(key, RSAPublicKey)
    return key


def big_endian(number: int) -> bytes:
    """Without leading zeros, as in a JWK (RFC 7518, section 6.3.1)."""
    return number.to_bytes((number.bit_length() + 7) // 8)


def _describe(kid: str, key: RSAPublicKey) -> identity_pb2.SigningKey:
    numbers = key.public_numbers()
    return identity_pb2.SigningKey(kid=kid, modulus=big_endian(numbers.n), exponent=big_endian(numbers.e))


def _no_key() -> HelixError:
    return HelixError(ErrorKind.UNAVAILABLE, "The first signing key is still being made. Try again.", retry_after_s=2)
