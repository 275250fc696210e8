"""ECDSA signatures on P-256 with SHA-256, DER-encoded, by keys that are named after themselves."""

import hashlib
import re
from base64 import urlsafe_b64decode
from typing import Any, Final, NamedTuple

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
)

_KEY_ID_CHARS: Final = 32
_ALGORITHM: Final = ec.ECDSA(SHA256())
_PEM: Final = re.compile(rb"-----BEGIN PUBLIC KEY-----[^-]+-----END PUBLIC KEY-----")


class SigningKey(NamedTuple):
    """A key that signs."""

    kid: str
    private: ec.EllipticCurvePrivateKey

    def sign(self, message: bytes) -> bytes:
        return self.private.sign(message, _ALGORITHM)


def key_id(public: ec.EllipticCurvePublicKey) -> str:
    """The first half of the SHA-256 of the key (SubjectPublicKeyInfo, DER), hexadecimal."""
    return hashlib.sha256(public_der(public)).hexdigest()[:_KEY_ID_CHARS]


def public_der(public: ec.EllipticCurvePublicKey) -> bytes:
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def public_pem(der: bytes) -> str:
    return load_der_public_key(der).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def is_signed(public: ec.EllipticCurvePublicKey, message: bytes, signature: bytes) -> bool:
    """Whether the key made the signature over `message`."""
    try:
        public.verify(signature, message, _ALGORITHM)
    except InvalidSignature:
        return False
    return True


def parse_public_keys(text: bytes) -> dict[str, ec.EllipticCurvePublicKey]:
    """By key id: one or more public keys in PEM, a JWK, or a set of JWKs. Raises `ValueError`."""
    if blocks := _PEM.findall(text):
        try:
            keys = [load_pem_public_key(block) for block in blocks]
        except UnsupportedAlgorithm as exc:
            raise ValueError("not a key of ECDSA on P-256") from exc
    else:
        try:
            document = msgspec.json.decode(text)
            keys = [_from_jwk(jwk) for jwk in document.get("keys", [document])]
        except (msgspec.DecodeError, AttributeError, KeyError, TypeError) as exc:
            raise ValueError("neither a public key in PEM nor a JWK") from exc
    found: dict[str, ec.EllipticCurvePublicKey] = {}
    for key in keys:
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError("not a key of ECDSA on P-256")
        found[key_id(key)] = key
    if not found:
        raise ValueError("holds no key")
    return found


def _from_jwk(jwk: Any) -> ec.EllipticCurvePublicKey:
    if (jwk["kty"], jwk["crv"]) != ("EC", "P-256"):
        raise ValueError("not a key of ECDSA on P-256")
    x, y = (int.from_bytes(urlsafe_b64decode(jwk[part] + "==")) for part in ("x", "y"))
    return ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
