"""Signed tokens as they travel: JWS compact serialisation (RFC 7515, section 7.1), read as strictly as it may be."""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Final

import msgspec

from helixflow.core.claims import ALGORITHM, MAX_TOKEN_BYTES, TOKEN_TYPE

_COMPACT: Final = re.compile(rb"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Exactly these: `jku`, `x5u`, `jwk` and the like would let a token say what to trust, `crit` what to believe."""

    alg: str
    typ: str
    kid: str


_headers: Final = msgspec.json.Decoder(_Header)


@dataclass(frozen=True, slots=True)
class SignedToken:
    """A token taken apart; nothing in it is verified. `signed` are the bytes that `signature` is over."""

    key_id: str
    payload: bytes
    signed: bytes
    signature: bytes


def parse_token(token: bytes) -> SignedToken:
    """Raises `ValueError`, without showing anything of the token, for whatever is not in the one form that we issue."""
    if len(token) > MAX_TOKEN_BYTES:
        raise ValueError("too long")
    parts = _COMPACT.fullmatch(token)
    if parts is None:
        raise ValueError("not three parts in base64url")
    header, payload, signature = map(_decode, parts.groups())
    try:
        head = _headers.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("not the header of an access token") from None
    if head.alg != ALGORITHM or head.typ != TOKEN_TYPE:
        raise ValueError("not the header of an access token")
    return SignedToken(head.kid, payload, token[: parts.end(2)], signature)


def _decode(part: bytes) -> bytes:
    """base64url without padding, in its one canonical form: no bits are left over (RFC 4648, section 3.5)."""
    try:
        data = base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))
    except binascii.Error:
        raise ValueError("not base64url") from None
    if base64.urlsafe_b64encode(data).rstrip(b"=") != part:
        raise ValueError("not canonical base64url")
    return data
