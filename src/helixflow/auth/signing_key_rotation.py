"""How signing keys come and go: announced before they sign, accepted until the last token of theirs has ended.

Only a key that may be known to others goes at once, and its tokens with it.
"""

import asyncio
import base64
import hashlib
from collections.abc import Callable
from typing import Final

import structlog
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from sqlalchemy import ColumnElement, delete, func, insert, select, true, update

from helixflow.auth.audit.entry import INSTALLATION
from helixflow.auth.caller import Caller, CallerKind
from helixflow.auth.sealing import Sealer
from helixflow.auth.signing_keys import PURPOSE, SEAL, SigningKeys, big_endian, signing
from helixflow.auth.tokens import ACCESS_LIFE_S
from helixflow.auth.unit import Unit, Units
from helixflow.core.claims import LEEWAY_S
from helixflow.core.errors import HelixError
from helixflow.rpc.access import Access, Level
from helixflow.rpc.generated.auth_v1 import admin_pb2, identity_pb2
from helixflow.storage.schema import signing_keys

KEY_BITS: Final = 4096
_EXPONENT: Final = 65537
# Every gateway knows a key before it signs: they are told within a second, and a watch that broke is soon made anew.
ANNOUNCED_S: Final = 10
# Only the very first sign-in could be too quick for it.
FIRST_ANNOUNCED_S: Final = 2
# A transaction that chose a key may still be on its way to sign with it.
_SLACK_S: Final = 60
_REFRESH_S: Final = 0.5
_SYSTEM: Final = Caller(CallerKind.SYSTEM, name="signing keys")
_ACCESS: Final = Access(Level.SERVICE, None, writes=True, idempotent=False)

log = structlog.get_logger("helixflow.auth")


def generate_rsa_key() -> RSAPrivateKey:
    """Takes 0.1 to 1.5 s of a core; the interpreter's lock is free meanwhile (measured: others wait 5 ms at most)."""
    return generate_private_key(_EXPONENT, KEY_BITS)


class SigningKeyRotation:
    """Makes the first key and, when told to, the next one. `run` it."""

    def __init__(
        self,
        units: Units,
        keys: SigningKeys,
        sealer: Sealer,
        *,
        generate: Callable[[], RSAPrivateKey] = generate_rsa_key,
    ) -> None:
        self._units = units
        self._keys = keys
        self._sealer = sealer
        self._generate = generate

    async def run(self) -> None:
        """Makes the first key, then keeps up with which ones are accepted, until cancelled."""
        made = failing = False
        while True:
            try:
                if not made:
                    await self.ensure_first()
                    made = True
                await self._keys.refresh()
                failing = False
            except HelixError as exc:
                # The keys that are known go on; the first key has to wait for the database.
                if not failing:
                    log.warning("signing_keys.unreadable", code=exc.code, reason=exc.message)
                failing = True
            await asyncio.sleep(_REFRESH_S)

    async def ensure_first(self) -> None:
        """Makes a key if there is none. Two processes that start at once end up with the same one."""
        any_key = select(signing_keys.c.kid).where(signing_keys.c.purpose == PURPOSE).limit(1)
        if await self._keys.public_keys():
            return
        key = await asyncio.to_thread(self._generate)
        async with self._units.writing(_SYSTEM, _ACCESS, "create_signing_key") as unit:
            if (await unit.connection.execute(any_key)).first() is None:
                kid = await self._add(unit, key, unit.now + FIRST_ANNOUNCED_S)
                unit.record("signing_key", kid, organisation_id=INSTALLATION)

    async def prepare(self, _request: admin_pb2.RotateSigningKeyRequest) -> RSAPrivateKey:
        """A new key, before the transaction."""
        return await asyncio.to_thread(self._generate)

    async def rotate(
        self, unit: Unit, request: admin_pb2.RotateSigningKeyRequest
    ) -> admin_pb2.RotateSigningKeyResponse:
        """The key that was prepared signs in a few seconds, those before it are accepted as long as their tokens; or it
        signs now, and the others are forgotten with their tokens.
        """
        if request.revoke_others:
            return await self._replace(unit)
        newest = select(func.max(signing_keys.c.active_at)).where(signing_keys.c.purpose == PURPOSE)
        # After all others, whatever the clock of the process says that made them.
        active_at = max(unit.now + ANNOUNCED_S, ((await unit.connection.execute(newest)).scalar() or 0) + 1)
        expires_at = active_at + ACCESS_LIFE_S + LEEWAY_S + _SLACK_S
        await unit.connection.execute(
            update(signing_keys)
            .where(signing_keys.c.purpose == PURPOSE, signing_keys.c.expires_at.is_(None))
            .values(expires_at=expires_at)
        )
        kid = await self._add(unit, unit.prepared, active_at)
        after = {"active_at": active_at, "others_expire_at": expires_at}
        unit.record("signing_key", kid, after=after, organisation_id=INSTALLATION)
        return admin_pb2.RotateSigningKeyResponse(kid=kid, others_expire_at=expires_at)

    async def retire(self, unit: Unit) -> None:
        """Erases private halves that sign no more, and forgets keys whose tokens have all ended."""
        settled = (await unit.connection.execute(signing(unit.now - _SLACK_S))).first()
        if settled is not None:
            await unit.connection.execute(
                update(signing_keys)
                .where(
                    signing_keys.c.purpose == PURPOSE,
                    signing_keys.c.active_at < settled.active_at,
                    signing_keys.c.private_key.is_not(None),
                )
                .values(private_key=None)
            )
        await self._forget(unit, signing_keys.c.expires_at <= unit.now)

    async def _replace(self, unit: Unit) -> admin_pb2.RotateSigningKeyResponse:
        """Forgets all other keys. If they were only marked, they would go on for a while where a clock is behind."""
        forgotten = await self._forget(unit, true())
        # Active already where the clock is behind.
        kid = await self._add(unit, unit.prepared, unit.now - LEEWAY_S)
        unit.record("signing_key", kid, after={"revoked": forgotten}, organisation_id=INSTALLATION)
        return admin_pb2.RotateSigningKeyResponse(kid=kid, others_expire_at=unit.now)

    async def _forget(self, unit: Unit, which: ColumnElement[bool]) -> list[str]:
        """Deletes those keys and tells the gateways; the names of what went."""
        gone = await unit.connection.execute(
            delete(signing_keys).where(signing_keys.c.purpose == PURPOSE, which).returning(signing_keys.c.kid)
        )
        kids = sorted(gone.scalars())
        for kid in kids:
            await unit.change(identity_pb2.CHANGE_KIND_SIGNING_KEYS, kid)
        return kids

    async def _add(self, unit: Unit, key: RSAPrivateKey, active_at: int) -> str:
        public = key.public_key()
        kid = thumbprint(public)
        der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        await unit.connection.execute(
            insert(signing_keys).values(
                kid=kid,
                purpose=PURPOSE,
                public_key=public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
                private_key=self._sealer.seal(SEAL, der, kid),
                created_at=unit.now,
                active_at=active_at,
                expires_at=None,
            )
        )
        await unit.change(identity_pb2.CHANGE_KIND_SIGNING_KEYS, kid)
        return kid


def thumbprint(key: RSAPublicKey) -> str:
    """The name of a key, made from itself (RFC 7638)."""
    numbers = key.public_numbers()
    e, n = (base64.urlsafe_b64encode(big_endian(number)).decode().rstrip("=") for number in (numbers.e, numbers.n))
    digest = hashlib.sha256(f'{{"e":"{e}","kty":"RSA","n":"{n}"}}'.encode()).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")
