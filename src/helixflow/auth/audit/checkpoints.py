"""Signed statements of how far a chain has come: what a checkpoint covers cannot be changed without being noticed."""

from collections.abc import Sequence
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)
from sqlalchemy import Row, and_, func, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.audit.chain import Head
from helixflow.auth.audit.lines import Checkpoint, signature_of
from helixflow.auth.audit.signatures import SigningKey, key_id, public_der, public_pem
from helixflow.auth.sealing import SealedColumn, Sealer
from helixflow.storage.engine import Database
from helixflow.storage.schema import audit_checkpoints, audit_heads, signing_keys

PURPOSE: Final = "audit"
_SEALED_AS: Final = "audit-signing-key"
SEALED: Final = SealedColumn(signing_keys.c.private_key, _SEALED_AS, only=signing_keys.c.purpose == PURPOSE)
EVERY_S: Final = 600
EVERY_RECORDS: Final = 1000
# Chains that are signed in one transaction: 3 ms of ECDSA.
_BATCH: Final = 100


class Checkpoints:
    """Makes checkpoints, and the key that signs them when there is none.

    A key signs until its private half is taken out of `signing_keys`; the public half stays for ever.
    """

    def __init__(self, database: Database, sealer: Sealer) -> None:
        self._database = database
        self._sealer = sealer

    async def sign_due(self, now: int) -> int:
        """Signs the heads of chains that grew by 1,000 records, or at all in ten minutes. Returns how many were due.

        For housekeeping, about once a minute. `now` is seconds since the epoch.
        """
        signed = 0
        while True:
            async with self._database.reading() as connection:
                if not await _find_due(connection, now):
                    return signed
            async with self._database.writing() as connection:
                # Again, now alone: another process may have been quicker.
                due = await _find_due(connection, now)
                key = await self.signing_key(connection, now)
                for row in due:
                    await _insert(connection, key, row.organisation_id, Head(row.sequence, row.hash), now)
            signed += len(due)

    async def sign_head(self, connection: AsyncConnection, organisation_id: str, key: SigningKey, now: int) -> Head:
        """Signs the head of a chain unless it is signed already; the transaction must be alone in writing.

        Returns the head, of a chain that may be empty.
        """
        query = select(audit_heads).where(audit_heads.c.organisation_id == organisation_id)
        row = (await connection.execute(query)).first()
        if row is None:
            return Head()
        head = Head(row.sequence, row.hash)
        if head.sequence > await last_signed(connection, organisation_id):
            await _insert(connection, key, organisation_id, head, now)
        return head

    async def signing_key(self, connection: AsyncConnection, now: int) -> SigningKey:
        """The key in use; made when there is none, so the transaction must be alone in writing."""
        query = select(signing_keys).where(signing_keys.c.purpose == PURPOSE, signing_keys.c.private_key.is_not(None))
        row = (await connection.execute(query.order_by(signing_keys.c.created_at.desc()).limit(1))).first()
        if row is not None:
            private = load_der_private_key(self._sealer.open(_SEALED_AS, row.private_key, row.kid), None)
            if not isinstance(private, ec.EllipticCurvePrivateKey):
                raise TypeError("a signing key of the audit log is not one of ECDSA")
            return SigningKey(row.kid, private)
        private = ec.generate_private_key(ec.SECP256R1())
        key = SigningKey(key_id(private.public_key()), private)
        der = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        await connection.execute(
            insert(signing_keys).values(
                kid=key.kid,
                purpose=PURPOSE,
                public_key=public_der(private.public_key()),
                private_key=self._sealer.seal(_SEALED_AS, der, key.kid),
                created_at=now,
                active_at=now,
                expires_at=None,
            )
        )
        return key


async def last_signed(connection: AsyncConnection, organisation_id: str) -> int:
    """The last record of a chain that a checkpoint covers; 0 for none."""
    query = select(func.max(audit_checkpoints.c.sequence)).where(audit_checkpoints.c.organisation_id == organisation_id)
    return int((await connection.execute(query)).scalar_one() or 0)


async def public_keys(connection: AsyncConnection) -> dict[str, str]:
    """Every public key that ever signed, in PEM, by key id."""
    query = select(signing_keys.c.kid, signing_keys.c.public_key).where(signing_keys.c.purpose == PURPOSE)
    rows = await connection.execute(query.order_by(signing_keys.c.created_at))
    return {row.kid: public_pem(row.public_key) for row in rows}


async def _find_due(connection: AsyncConnection, now: int) -> Sequence[Row[Any]]:
    earlier = audit_checkpoints.alias()
    # One look into the primary key for each chain, however many checkpoints there are.
    last = (
        select(func.max(earlier.c.sequence))
        .where(earlier.c.organisation_id == audit_heads.c.organisation_id)
        .correlate(audit_heads)
        .scalar_subquery()
    )
    signed = audit_checkpoints.c
    query = (
        select(audit_heads)
        .select_from(audit_heads)
        .outerjoin(
            audit_checkpoints,
            and_(signed.organisation_id == audit_heads.c.organisation_id, signed.sequence == last),
        )
        .where(
            or_(
                signed.sequence.is_(None),
                and_(audit_heads.c.sequence > signed.sequence, signed.at <= now - EVERY_S),
                audit_heads.c.sequence >= signed.sequence + EVERY_RECORDS,
            )
        )
    )
    return (await connection.execute(query.order_by(audit_heads.c.organisation_id).limit(_BATCH))).all()


async def _insert(connection: AsyncConnection, key: SigningKey, organisation_id: str, head: Head, now: int) -> None:
    signature = signature_of(Checkpoint(organisation_id, head.sequence, head.hash.hex(), now, key.kid), key)
    await connection.execute(
        insert(audit_checkpoints).values(
            organisation_id=organisation_id,
            sequence=head.sequence,
            hash=head.hash,
            at=now,
            kid=key.kid,
            signature=signature,
        )
    )
