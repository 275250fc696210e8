"""What the database may hold only sealed: private keys, second factors, remembered answers. And keyed hashes."""

import hmac
import secrets
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy import Column, ColumnElement, true

from helixflow.core.errors import ErrorKind, HelixError

KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
# The first byte of what is sealed: another algorithm takes another one.
_AES_256_GCM: Final = b"\x01"


@dataclass(frozen=True, slots=True)
class SealedColumn:
    """Where sealed values are, for who seals all of them anew: in `column`, of the rows of which `only` is true.

    Their context is the row's primary key, its parts joined by NUL.
    """

    column: Column[Any]
    purpose: str
    only: ColumnElement[bool] = field(default_factory=true)


class Sealer:
    """AES-256-GCM under keys derived from the master key, one for each purpose (HKDF-SHA-256, RFC 5869).

    `context` says to what the value belongs, a row's id for instance: it opens only with the same one, so that a value
    that was moved to another row is refused. Random nonces: far fewer values than 2**32 are ever sealed for a purpose.
    """

    def __init__(self, master_key: bytes) -> None:
        if len(master_key) != KEY_BYTES:
            raise ValueError(f"the master key has {KEY_BYTES} bytes")
        # Purposes are few and known; a derivation takes as long as ten seals.
        self._derived = lru_cache(maxsize=32)(lambda info: HKDF(SHA256(), KEY_BYTES, None, info).derive(master_key))

    def seal(self, purpose: str, plain: bytes, context: str = "") -> bytes:
        """Unreadable and unchangeable without the master key; 29 bytes longer."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = AESGCM(self._key("seal", purpose)).encrypt(nonce, plain, _associated(purpose, context))
        return _AES_256_GCM + nonce + sealed

    def open(self, purpose: str, sealed: bytes, context: str = "") -> bytes:
        """What was sealed for the same purpose and context. Raises `HelixError` INTERNAL for anything else."""
        algorithm, nonce, body = sealed[:1], sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        try:
            if algorithm != _AES_256_GCM:
                raise ValueError("sealed by an algorithm that this version does not know")
            return AESGCM(self._key("seal", purpose)).decrypt(nonce, body, _associated(purpose, context))
        except (InvalidTag, ValueError) as exc:
            raise HelixError(ErrorKind.INTERNAL, "A sealed value of the database cannot be opened.") from exc

    def digest(self, purpose: str, data: bytes) -> bytes:
        """32 bytes that say nothing of `data` to who has not the master key, and always the same (HMAC-SHA-256)."""
        return hmac.digest(self._key("hash", purpose), data, "sha256")

    def _key(self, use: str, purpose: str) -> bytes:
        return self._derived(f"helixflow/{use}/{purpose}".encode())


def _associated(purpose: str, context: str) -> bytes:
    return f"{purpose}\0{context}".encode()
