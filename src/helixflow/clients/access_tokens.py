"""Reads an access token (RFC 9068, RS256): its signature, its times, by whom and for whom it was made. Nothing more."""

from collections.abc import Callable
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256

from helixflow.clients.cutoffs import MAX_TOKEN_LIFE_S
from helixflow.clients.jws import parse_token
from helixflow.core.claims import LEEWAY_S, AccessClaims
from helixflow.core.errors import ErrorKind, HelixError

FindKey = Callable[[str], RSAPublicKey | None]

_INVALID: Final = "The access token is not valid. Sign in again with: helixflow login"
_EXPIRED: Final = "The access token has expired. Refresh it, or sign in again with: helixflow login"

_claims: Final = msgspec.json.Decoder(AccessClaims)
_PADDING: Final = PKCS1v15()
_HASH: Final = SHA256()


def read_access_token(
    token: bytes, find_key: FindKey, *, issuer: str, audience: str, now: float
) -> tuple[AccessClaims, float]:
    """The claims, and for how many seconds more they hold. `find_key` gives the public key of a `kid`, None for none.

    Whether the session still stands is not looked at. Raises `HelixError` INVALID_TOKEN.
    """
    try:
        parsed = parse_token(token)
        key = find_key(parsed.key_id)
        if key is None:
            raise ValueError("signed by nobody we know")
        key.verify(parsed.signature, parsed.signed, _PADDING, _HASH)
        claims = _claims.decode(parsed.payload)
    except (ValueError, InvalidSignature, RecursionError):
        # msgspec.DecodeError and UnicodeDecodeError are ValueErrors. Causes may show parts of the token.
        raise HelixError(ErrorKind.INVALID_TOKEN, _INVALID) from None
    if claims.iss != issuer or claims.aud != audience or not (claims.sub and claims.sid):
        raise HelixError(ErrorKind.INVALID_TOKEN, _INVALID)
    latest = now + LEEWAY_S
    if claims.nbf > latest or claims.iat > latest or not 0 < claims.exp - claims.iat <= MAX_TOKEN_LIFE_S:
        raise HelixError(ErrorKind.INVALID_TOKEN, _INVALID)
    left_s = claims.exp + LEEWAY_S - now
    if left_s <= 0:
        raise HelixError(ErrorKind.INVALID_TOKEN, _EXPIRED)
    return claims, left_s
