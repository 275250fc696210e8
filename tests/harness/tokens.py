"""Access tokens as the auth service makes them, and as somebody who is not the auth service might."""

import base64
import time
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256

from helixflow.rpc.generated.auth_v1 import identity_pb2

ISSUER, AUDIENCE = "helixflow-test", "helixflow-api"


def base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


@cache
def signing_key(name: str, bits: int = 2048) -> RSAPrivateKey:
    """A key for the whole run: making one takes a while."""
    return generate_private_key(65537, bits)


class TokenMint:
    """Signs with the key `kid`; `now` is when its tokens begin, seconds since the epoch."""

    def __init__(self, kid: str = "key-1", *, bits: int = 2048, now: float | None = None) -> None:
        self.kid = kid
        self.key = signing_key(kid, bits)
        self.now = int(time.time() if now is None else now)

    @property
    def public(self) -> identity_pb2.SigningKey:
        numbers = self.key.public_key().public_numbers()
        size = (numbers.n.bit_length() + 7) // 8
        return identity_pb2.SigningKey(kid=self.kid, modulus=numbers.n.to_bytes(size), exponent=b"\1\0\1")

    def claims(self, **changes: Any) -> dict[str, Any]:
        return {
            "iss": ISSUER,
            "sub": "acc_1",
            "aud": AUDIENCE,
            "exp": self.now + 3600,
            "iat": self.now,
            "nbf": self.now,
            "jti": "tok_1",
            "org": "org_1",
            "project": "proj_1",
            "roles": ["developer"],
            "scope": "models:read models:use",
            "sid": "ses_1",
            "rev": 10,
            "name": "Ada",
            **changes,
        }

    @property
    def header(self) -> dict[str, Any]:
        return {"alg": "RS256", "typ": "at+jwt", "kid": self.kid}

    def sign_parts(self, header: bytes, payload: bytes) -> bytes:
        signed = base64url(header) + b"." + base64url(payload)
        return signed + b"." + base64url(self.key.sign(signed, PKCS1v15(), SHA256()))

    def sign(self, claims: Mapping[str, Any], header: Mapping[str, Any] | None = None) -> bytes:
        encode = msgspec.json.encode
        return self.sign_parts(encode(self.header if header is None else header), encode(claims))

    def token(self, **changes: Any) -> bytes:
        return self.sign(self.claims(**changes))


def snapshot(
    revision: int, keys: Iterable[identity_pb2.SigningKey] = (), changes: Iterable[identity_pb2.Change] = ()
) -> identity_pb2.WatchChangesResponse:
    """The first message of a watch."""
    return identity_pb2.WatchChangesResponse(
        revision=revision, changes=list(changes), signing_keys=list(keys), issuer=ISSUER, audience=AUDIENCE
    )


def change(
    revision: int, kind: int, subject: str = "", *, key_hash: bytes = b"", org: str = ""
) -> identity_pb2.WatchChangesResponse:
    """A later message. Kinds are numbers: a newer service may send one that nobody knows."""
    made = identity_pb2.Change(kind=kind, subject_id=subject, key_hash=key_hash, revision=revision, organisation_id=org)
    return identity_pb2.WatchChangesResponse(revision=revision, changes=[made])
