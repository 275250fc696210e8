"""Access tokens: JSON web tokens (RFC 7519, RFC 9068) with what an account may do, signed with RS256."""

import asyncio
import base64
import secrets
from dataclasses import dataclass, field
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.hashes import SHA256

from helixflow.auth.shares import read_shares
from helixflow.auth.signing_keys import SigningKeys
from helixflow.auth.unit import Unit
from helixflow.clients.access_tokens import read_access_token
from helixflow.clients.cutoffs import MAX_TOKEN_LIFE_S
from helixflow.core.claims import ALGORITHM, TOKEN_TYPE, AccessClaims
from helixflow.core.clock import Clock
from helixflow.core.permissions import Permission

ACCESS_LIFE_S: Final = MAX_TOKEN_LIFE_S


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a token is for, and what it says of them. `revision` was read before `roles` and `permissions` were;
    `session_until` is when the session ends unless it is refreshed, in seconds since the epoch.
    """

    account_id: str
    name: str
    session_id: str
    session_until: int
    organisation_id: str
    project_id: str
    roles: tuple[str, ...]
    permissions: frozenset[Permission]
    revision: int


@dataclass(frozen=True, slots=True)
class UnsignedToken:
    """Claims, and the key that was chosen to sign them."""

    claims: AccessClaims
    kid: str
    key: RSAPrivateKey = field(repr=False)


class AccessTokens:
    """Makes them, and reads them back."""

    def __init__(self, keys: SigningKeys, clock: Clock, *, issuer: str, audience: str) -> None:
        self._keys = keys
        self._clock = clock
        self._issuer = issuer
        self._audience = audience

    async def draft(self, unit: Unit, subject: Subject) -> UnsignedToken:
        """A token for an hour from now, or until the session's end. Sign it once the unit is committed.

        Raises `HelixError` UNAVAILABLE.
        """
        kid, key = await self._keys.choose(unit.connection, unit.now)
        shares = await read_shares(unit.connection, subject.organisation_id)
        claims = AccessClaims(
            iss=self._issuer,
            sub=subject.account_id,
            aud=self._audience,
            exp=min(unit.now + ACCESS_LIFE_S, subject.session_until),
            iat=unit.now,
            nbf=unit.now,
            jti=secrets.token_hex(16),
            org=subject.organisation_id,
            project=subject.project_id,
            roles=list(subject.roles),
            scope=" ".join(sorted(permission.value for permission in subject.permissions)),
            sid=subject.session_id,
            rev=subject.revision,
            name=subject.name,
            weight=shares.weight,
            residency=shares.residency,
        )
        return UnsignedToken(claims, kid, key)

    async def sign(self, draft: UnsignedToken) -> str:
        """The token. Takes 5 ms, in a thread."""
        return await asyncio.to_thread(sign_token, draft)

    def read(self, token: str) -> AccessClaims:
        """The claims of a token of ours that has not expired. Raises `HelixError` INVALID_TOKEN."""
        claims, _ = read_access_token(
            token.encode(),
            self._keys.accepted,
            issuer=self._issuer,
            audience=self._audience,
            now=self._clock.now(),
        )
        return claims


def sign_token(draft: UnsignedToken) -> str:
    """JWS compact serialisation (RFC 7515, section 7.1)."""
    header = msgspec.json.encode({"alg": ALGORITHM, "typ": TOKEN_TYPE, "kid": draft.kid})
    signed = _base64url(header) + b"." + _base64url(msgspec.json.encode(draft.claims))
    signature = draft.key.sign(signed, PKCS1v15(), SHA256())
    return (signed + b"." + _base64url(signature)).decode()


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
