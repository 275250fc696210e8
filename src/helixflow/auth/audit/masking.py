"""What enters a record is made harmless here: secrets are masked, text is bounded and can be stored everywhere.

A second line of defence: whoever records an act leaves secrets out in the first place.
"""

import json
import math
import re
from collections.abc import Mapping, Set
from enum import Enum
from typing import Any, Final

from helixflow.core.keys import mask_secrets

MAX_TEXT: Final = 1000
MAX_ITEMS: Final = 500
MAX_DEPTH: Final = 8
# Of one state, in bytes: a page of 100 records fits one gRPC message of 4 MiB.
MAX_STATE: Final = 16 * 1024
MASK: Final = "***"

# Password hashes, private keys, authenticator secrets.
_SECRET: Final = re.compile(
    r"\$argon2[^\s]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[^-]*(?:-----END [A-Z ]*PRIVATE KEY-----)?)"
    r"|otpauth://[^\s]*"
)
_SECRET_WORDS: Final = frozenset(
    {
        *("password", "passwords", "passphrase", "secret", "secrets", "token", "tokens", "credential", "credentials"),
        *("authorization", "cookie", "otp", "totp", "code", "codes", "hash", "hashes"),
    }
)
_SECRET_NAMES: Final = frozenset({"private_key", "api_key", "signing_key"})
_WORDS: Final = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
# NUL cannot be stored by PostgreSQL, a lone surrogate is not text.
_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")


def plain(text: str) -> str:
    """`text` without secrets, with U+FFFD for what cannot be stored, and cut with a mark after `MAX_TEXT` signs."""
    # Bounded first, so that masking takes no time worth an attack; a secret cut here is still recognised as one.
    shown = _UNSTORABLE.sub("\ufffd", text[: 4 * MAX_TEXT])
    shown = _SECRET.sub(MASK, mask_secrets(shown))
    return shown if max(len(text), len(shown)) <= MAX_TEXT else f"{shown[:MAX_TEXT]}… ({len(text)} characters)"


def state_text(state: Mapping[str, Any] | None) -> str:
    """The JSON text of a state before or after an act: masked and bounded; '' for None.

    Raises `TypeError` for what has no place in JSON.
    """
    if state is None:
        return ""
    text = _render(_masked(state, MAX_DEPTH))
    size = len(text.encode())
    return text if size <= MAX_STATE else _render({"…": f"too large to record: {size} bytes"})


def _render(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _masked(value: Any, depth: int) -> Any:
    match value:
        case Enum():
            return _masked(value.value, depth)
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case str():
            return plain(value)
        case Mapping() | list() | tuple() | Set() if depth == 0:
            return "…"
        case Mapping():
            return _bounded_object(value, depth)
        case list() | tuple() | Set():
            items = sorted(value) if isinstance(value, Set) else value
            shown = [_masked(item, depth - 1) for item in items[:MAX_ITEMS]]
            return shown if len(items) <= MAX_ITEMS else [*shown, f"… and {len(items) - MAX_ITEMS} more"]
    raise TypeError(f"{type(value).__name__} has no place in an audit record")


def _bounded_object(fields: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, value in fields.items():
        if len(shown) == MAX_ITEMS:
            shown["…"] = f"and {len(fields) - MAX_ITEMS} more"
            break
        shown[plain(str(name))] = MASK if _is_secret(str(name), value) else _masked(value, depth - 1)
    return shown


def _is_secret(name: str, value: Any) -> bool:
    """Whether what a field of this name holds is masked: not in `token_expires_at: 5` or `password: true`."""
    if value is None or isinstance(value, bool) or value in ("", [], ()):
        return False
    words = [word.lower() for word in _WORDS.findall(name)]
    if "_".join(words) in _SECRET_NAMES:
        return True
    said = words[-1:] if isinstance(value, int | float) else words
    return not _SECRET_WORDS.isdisjoint(said)
