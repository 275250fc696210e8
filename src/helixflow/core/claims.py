"""What stands in an access token (RFC 7519, RFC 9068)."""

from typing import Final

import msgspec

ALGORITHM: Final = "RS256"
TOKEN_TYPE: Final = "at+jwt"  # noqa: S105  (no secret)
# Clocks of our own machines may differ by this much, seconds.
LEEWAY_S: Final = 5
# Longer than any token of ours: refused before anything is decoded.
MAX_TOKEN_BYTES: Final = 8192


class AccessClaims(msgspec.Struct, frozen=True, kw_only=True):
    """Claims of an access token. Times are seconds since the epoch.

    `org` and `project` are ids, `project` empty for none; `roles` names of roles in the organisation;
    `scope` the permissions that hold in the project (without one: in the organisation), and an operator's in the
    installation, separated by spaces; `sid` the session; `rev` the revision of the directory that the claims were made
    from: what changed later makes them void. `weight` and `residency` are the organisation's, see `Principal`.
    """

    iss: str
    sub: str
    aud: str
    exp: int
    iat: int
    nbf: int
    jti: str
    org: str
    project: str
    roles: list[str]
    scope: str
    sid: str
    rev: int
    name: str = ""
    weight: int = 100
    residency: str = ""
