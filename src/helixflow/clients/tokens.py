"""Access tokens, verified here and now: with the keys that the watch brought, asking nobody."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import structlog
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey, RSAPublicNumbers

from helixflow.clients.access_tokens import read_access_token
from helixflow.clients.changes import ChangeWatch
from helixflow.clients.cutoffs import CutOffs
from helixflow.clients.principals import parse_permissions
from helixflow.core.claims import AccessClaims
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.principal import Principal, PrincipalKind
from helixflow.rpc.generated.auth_v1 import identity_pb2

# Below this a modulus can be factored, or soon will be (NIST SP 800-131A).
MIN_MODULUS_BYTES: Final = 256

_VOID: Final = "The access token is no longer valid: its session ended, or what it allows has changed. Refresh it."
_AWAY: Final = "Access tokens cannot be checked now: the auth service does not answer. Try again."

log = structlog.get_logger("helixflow.clients")


@dataclass(slots=True)
class _Verified:
    """`until` is on the monotonic clock, seconds."""

    principal: Principal
    until: float


class TokenVerifier:
    """Identities by access token (RFC 9068, RS256): at most `size` verified ones kept, each until it expires.

    Follows `watch`: a token whose session, account, project or organisation has changed since it was made is refused.
    When the watch no longer vouches for that, tokens work for `grace_s` more and are then refused as UNAVAILABLE, as
    they are before the watch has stood for the first time.
    """

    def __init__(self, watch: ChangeWatch, *, size: int, grace_s: float, clock: Clock) -> None:
        self._watch = watch
        self._size = size
        self._grace_s = grace_s
        self._clock = clock
        self._monotonic = clock.monotonic
        self._keys: Mapping[str, RSAPublicKey] = {}
        self._issuer = self._audience = ""
        self._trusted: tuple[str, str, Sequence[identity_pb2.SigningKey]] = ("", "", ())
        self._cutoffs = CutOffs(clock.monotonic)
        # By the token itself: its SHA-256 would take three times as long as all the rest. The oldest first.
        self._verified: dict[bytes, _Verified] = {}
        watch.follow(self)

    def cached(self, token: bytes) -> Principal | None:
        """The identity if the token has been verified and still counts."""
        entry = self._verified.get(token)
        if entry is None:
            return None
        now = self._monotonic()
        if now < entry.until and now < self._watch.vouched_until + self._grace_s:
            return entry.principal
        return None

    def verify(self, token: bytes) -> Principal:
        """Whom the token speaks for. Raises `HelixError`: INVALID_TOKEN, or UNAVAILABLE when it cannot be judged.

        Takes up to 250 µs for a token that is not cached, nearly all of it for the signature.
        """
        if self._monotonic() >= self._watch.vouched_until + self._grace_s:
            raise HelixError(ErrorKind.UNAVAILABLE, _AWAY, retry_after_s=1)
        if (principal := self.cached(token)) is not None:
            return principal
        claims, left_s = read_access_token(
            token, self._keys.get, issuer=self._issuer, audience=self._audience, now=self._clock.now()
        )
        if self._cutoffs.void(claims):
            raise HelixError(ErrorKind.INVALID_TOKEN, _VOID)
        principal = _principal_of(claims)
        self._keep(token, _Verified(principal, self._monotonic() + left_s))
        return principal

    def forget(self) -> None:
        self._verified.clear()

    def begin(self, changes: Sequence[identity_pb2.Change]) -> None:
        self._cutoffs.replace(changes)

    def apply(self, change: identity_pb2.Change) -> None:
        self._cutoffs.add(change)
        subject, organisation = change.subject_id, change.organisation_id
        match change.kind:
            case identity_pb2.CHANGE_KIND_SESSION:
                self._forget_where(lambda principal: principal.session_id == subject)
            case identity_pb2.CHANGE_KIND_OWNER:
                self._forget_where(
                    lambda principal: principal.id == subject and organisation in ("", principal.organisation_id)
                )
            case identity_pb2.CHANGE_KIND_PROJECT:
                self._forget_where(lambda principal: principal.project_id == subject)
            case identity_pb2.CHANGE_KIND_ORGANISATION:
                self._forget_where(lambda principal: principal.organisation_id == subject)

    def trust(self, watch: ChangeWatch) -> None:
        """Takes over who signs, and for whom. What was verified by a key that is gone is verified no more."""
        trusted = (watch.issuer, watch.audience, watch.signing_keys)
        if trusted == self._trusted:
            return
        self._trusted = trusted
        self._issuer, self._audience = watch.issuer, watch.audience
        self._keys = {key.kid: public for key in watch.signing_keys if (public := _public_key(key)) is not None}
        self._verified.clear()

    def _keep(self, token: bytes, entry: _Verified) -> None:
        kept = self._verified
        kept.pop(token, None)
        while len(kept) >= self._size:
            del kept[next(iter(kept))]
        kept[token] = entry

    def _forget_where(self, concerns: Callable[[Principal], bool]) -> None:
        for token in [token for token, entry in self._verified.items() if concerns(entry.principal)]:
            del self._verified[token]


def _public_key(key: identity_pb2.SigningKey) -> RSAPublicKey | None:
    """None, and an error in the log, for what is no key to trust: the others go on."""
    try:
        if len(key.modulus) < MIN_MODULUS_BYTES:
            raise ValueError("the modulus is too short")
        return RSAPublicNumbers(int.from_bytes(key.exponent), int.from_bytes(key.modulus)).public_key()
    except ValueError as exc:
        log.error("signing_key.unusable", kid=key.kid, reason=str(exc))
        return None


def _principal_of(claims: AccessClaims) -> Principal:
    return Principal(
        kind=PrincipalKind.ACCOUNT,
        id=claims.sub,
        name=claims.name,
        organisation_id=claims.org,
        project_id=claims.project,
        session_id=claims.sid,
        permissions=parse_permissions(tuple(claims.scope.split(" "))),
        organisation_weight=claims.weight,
        residency=claims.residency,
    )
