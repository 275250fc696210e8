"""What is recorded of one act."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from helixflow.auth.caller import Caller

# The chain of what concerns the installation and no organisation.
INSTALLATION = ""


class Outcome(Enum):
    """What became of the act. The value is what the record says."""

    DONE = "done"
    DENIED = "denied"


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One act, before it is given its place in the chain of `organisation_id`.

    `action` is the RPC in snake case. `before` and `after` are JSON objects without secrets, None where there is
    nothing to show. `reason` is the error's code when it was denied. `at` is seconds since the epoch, where that is not
    when it is recorded.
    """

    organisation_id: str
    caller: Caller
    action: str
    target_kind: str
    target_id: str
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    outcome: Outcome = Outcome.DONE
    reason: str = ""
    at: int | None = None
