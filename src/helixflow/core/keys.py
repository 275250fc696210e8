"""The format of API keys and other opaque secrets: a prefix, 40 random base-62 characters, 6 characters of checksum.

The checksum lets a typo be refused without a look-up. Only the SHA-256 of a secret is ever stored: 40 characters carry
238 bits, so a slow hash would protect nothing.
"""

import hashlib
import re
import secrets
import zlib
from typing import Final

PREFIX: Final = "hfk_"
REFRESH_PREFIX: Final = "hfr_"
# Invitations, first passwords, resets: redeemed once.
TOKEN_PREFIX: Final = "hft_"  # noqa: S105  (no secret)
# Between password and second factor.
CHALLENGE_PREFIX: Final = "hfc_"
_ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_DIGITS: Final = frozenset(_ALPHABET)
_RANDOM_CHARS: Final = 40
_CHECK_CHARS: Final = 6
KEY_LENGTH: Final = len(PREFIX) + _RANDOM_CHARS + _CHECK_CHARS
# Also those that were cut off, and JSON web tokens.
_SECRETS: Final = re.compile(r"(hf[krtc]_)[0-9A-Za-z]{12,}|eyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?", re.ASCII)


def generate_key(prefix: str = PREFIX) -> str:
    """A fresh key from the operating system's random source. All prefixes have the same length."""
    secret = "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_CHARS))
    return prefix + secret + _checksum(prefix + secret)


def is_well_formed(key: str, prefix: str = PREFIX) -> bool:
    """Whether `key` has the right prefix, length, alphabet and checksum: says nothing about whether it exists."""
    if len(key) != KEY_LENGTH or not key.startswith(prefix) or not _DIGITS.issuperset(key[len(PREFIX) :]):
        return False
    return _checksum(key[:-_CHECK_CHARS]) == key[-_CHECK_CHARS:]


def hash_key(key: str) -> bytes:
    """The 32 bytes under which a key is stored and cached."""
    return hashlib.sha256(key.encode()).digest()


def mask_key(key: str) -> str:
    """What may be shown of a key: enough to recognise it, too little to use it."""
    return f"{key[:8]}…{key[-4:]}" if len(key) == KEY_LENGTH else f"{key[:4]}…"


def mask_secrets(text: str) -> str:
    """`text` with `***` for what looks like a key or token of ours in it. For bounded texts that people wrote."""
    return _SECRETS.sub(lambda found: f"{found[1] or ''}***", text)


def _checksum(text: str) -> str:
    value = zlib.crc32(text.encode())
    digits = []
    for _ in range(_CHECK_CHARS):
        value, digit = divmod(value, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
