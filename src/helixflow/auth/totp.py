"""Time-based one-time passwords (RFC 6238: SHA-1, six digits, 30 s, as all authenticators do) and recovery codes."""

import base64
import hashlib
import secrets
from typing import Final
from urllib.parse import quote

from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.twofactor.hotp import HOTP

SECRET_BYTES: Final = 20
STEP_S: Final = 30
_DIGITS: Final = 6
# Clocks of telephones are off by a little, and typing takes a while.
_SKEW_STEPS: Final = 1
RECOVERY_CODES: Final = 10
# 80 bits: nothing to guess, so a quick hash keeps them.
_RECOVERY_BYTES: Final = 10
_ISSUER: Final = "HelixFlow"


def new_secret() -> bytes:
    """20 random bytes, what RFC 4226 recommends."""
    return secrets.token_bytes(SECRET_BYTES)


def secret_text(secret: bytes) -> str:
    """Base32 without padding, for typing into an authenticator."""
    return base64.b32encode(secret).decode().rstrip("=")


def enrolment_uri(secret: bytes, email: str) -> str:
    """What a QR code for authenticators says."""
    label = quote(f"{_ISSUER}:{email}", safe="")
    period = f"algorithm=SHA1&digits={_DIGITS}&period={STEP_S}"
    return f"otpauth://totp/{label}?secret={secret_text(secret)}&issuer={_ISSUER}&{period}"


def code_at(secret: bytes, step: int) -> str:
    """The code of one time step."""
    return HOTP(secret, _DIGITS, SHA1()).generate(step).decode()  # noqa: S303 — HMAC-SHA-1, as the RFC has it


def matching_step(secret: bytes, code: str, now: float, last_used: int) -> int | None:
    """The time step, later than `last_used`, whose code this is at `now`; None for a wrong or used code."""
    digits = "".join(code.split())
    if len(digits) != _DIGITS or not (digits.isascii() and digits.isdecimal()):
        return None
    current = int(now) // STEP_S
    found = None
    for step in range(current - _SKEW_STEPS, current + _SKEW_STEPS + 1):
        if secrets.compare_digest(code_at(secret, step), digits) and step > last_used and found is None:
            found = step
    return found


def new_recovery_codes() -> list[str]:
    """Ten codes for when the authenticator is lost, in groups of four letters and digits."""
    codes = (base64.b32encode(secrets.token_bytes(_RECOVERY_BYTES)).decode().lower() for _ in range(RECOVERY_CODES))
    return ["-".join(code[at : at + 4] for at in range(0, len(code), 4)) for code in codes]


def recovery_hash(code: str) -> bytes:
    """Under which a recovery code is kept, however it was typed: 32 bytes."""
    plain = "".join(code.split()).replace("-", "").lower()
    return hashlib.sha256(plain.encode()).digest()
