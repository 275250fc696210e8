"""The names of what we keep in Redis.

Counters carry their organisation as a hash tag; those of the installation have none. Budgets, parallel calls and
reservations belong to an epoch and are of no use in another one; rates outlive it.
"""

from typing import Final

from helixflow.metering.policies import Limit

EPOCH: Final = "hf:epoch"
GARBAGE: Final = "hf:garbage"


def rate_key(limit: Limit) -> str:
    return f"hf:{_tag(limit.organisation_id)}l:{limit.id}"


def parallel_place(limit: Limit) -> str:
    return f"{_tag(limit.organisation_id)}p:{limit.id}"


def budget_place(organisation_id: str, counter: str) -> str:
    """`counter` as in holds."""
    return f"{_tag(organisation_id)}{counter}"


def epoch_key(epoch: str, place: str) -> str:
    """Where that is in an epoch."""
    return f"hf:{epoch}:{place}"


def journal_key(epoch: str, journal_id: str) -> str:
    """A gateway's reservations and leases."""
    return f"hf:{epoch}:calls:{journal_id}"


def _tag(organisation_id: str) -> str:
    return f"{{{organisation_id}}}:" if organisation_id else ""
