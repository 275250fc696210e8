"""What ends access tokens before they expire."""

from collections.abc import Callable, Iterable
from typing import Final

from helixflow.core.claims import LEEWAY_S, AccessClaims
from helixflow.rpc.generated.auth_v1 import identity_pb2

# No token lives longer; one that claims to is refused, since its cut-off would be forgotten before it ends.
MAX_TOKEN_LIFE_S: Final = 3600
# Longer than any token that a cut-off may be about, our clocks' differences included.
KEEP_S: Final = MAX_TOKEN_LIFE_S + 12 * LEEWAY_S

_ENDING: Final = frozenset(
    {
        identity_pb2.CHANGE_KIND_SESSION,
        identity_pb2.CHANGE_KIND_OWNER,
        identity_pb2.CHANGE_KIND_PROJECT,
        identity_pb2.CHANGE_KIND_ORGANISATION,
    }
)
_Subject = tuple[int, str, str]


class CutOffs:
    """Changes that void tokens made from an earlier state of the directory. A session's end voids all of its tokens."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        # Revision and time of hearing, the latest heard last.
        self._heard: dict[_Subject, tuple[int, float]] = {}

    def __len__(self) -> int:
        return len(self._heard)

    def replace(self, changes: Iterable[identity_pb2.Change]) -> None:
        self._heard.clear()
        for change in changes:
            self.add(change)

    def add(self, change: identity_pb2.Change) -> None:
        """Takes note of a change if it is of a kind that ends tokens."""
        if change.kind not in _ENDING:
            return
        now = self._monotonic()
        self._prune(now)
        limited = change.organisation_id if change.kind == identity_pb2.CHANGE_KIND_OWNER else ""
        subject = (int(change.kind), change.subject_id, limited)
        revision, _ = self._heard.pop(subject, (0, now))
        self._heard[subject] = (max(revision, change.revision), now)

    def void(self, claims: AccessClaims) -> bool:
        """Whether something that the claims were made from has changed since."""
        heard = self._heard
        if (identity_pb2.CHANGE_KIND_SESSION, claims.sid, "") in heard:
            return True
        return any(
            found[0] > claims.rev
            for subject in (
                (identity_pb2.CHANGE_KIND_OWNER, claims.sub, ""),
                (identity_pb2.CHANGE_KIND_OWNER, claims.sub, claims.org),
                (identity_pb2.CHANGE_KIND_PROJECT, claims.project, ""),
                (identity_pb2.CHANGE_KIND_ORGANISATION, claims.org, ""),
            )
            if (found := heard.get(subject)) is not None
        )

    def _prune(self, now: float) -> None:
        heard = self._heard
        while heard:
            oldest = next(iter(heard))
            if now - heard[oldest][1] <= KEEP_S:
                return
            del heard[oldest]
