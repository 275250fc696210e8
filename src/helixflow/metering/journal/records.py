"""The records of the journal. Encoded as MessagePack arrays: fields are only ever added, at the end, with a default.

Moments are milliseconds since the epoch, durations milliseconds (-1: did not come to it), money nanodollars.
"""

from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import Struct

from helixflow.core.errors import ErrorKind, HelixError


class Tokens(Struct, array_like=True, frozen=True, gc=False):
    """Usage so far. Not `reported`: counted by us."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    reported: bool = False

    @property
    def total(self) -> int:
        return self.prompt + self.completion


class SideCharge(Struct, array_like=True, frozen=True, gc=False):
    """What a deployment charges for a call that another one answered; part of the call's cost."""

    deployment: str
    tokens: Tokens
    engine_ms: int
    cost: int
    price_version: str


class Admitted(Struct, array_like=True, tag=1, frozen=True, gc=False):
    """A call that may be dispatched. `holds` are what it has reserved: (counter, amount); see `metering.admission`."""

    call_id: str
    admitted_at_ms: int
    request_id: str
    organisation_id: str
    project_id: str
    key_id: str
    user_id: str
    model: str
    dialect: str
    operation: str
    stream: bool
    tags: dict[str, str] | None = None
    holds: tuple[tuple[str, int], ...] = ()
    # How it was authorised and limited, for `explain`: policies that applied, tokens and cost that were reserved.
    authorised_by: str = ""
    policies: tuple[str, ...] = ()
    reserved_tokens: int = 0
    reserved_cost: int = 0


class Progressed(Struct, array_like=True, tag=2, frozen=True, gc=False):
    """What a call has used so far, in place of its settlement should that never come."""

    call_id: str
    at_ms: int
    deployment: str
    tokens: Tokens
    cost: int
    price_version: str
    first_token_ms: int = -1
    # What `cost` was rated by: a row must show all of it.
    engine_ms: int = -1
    side: tuple[SideCharge, ...] = ()


class Settled(Struct, array_like=True, tag=3, frozen=True, gc=False):
    """The end of a call."""

    call_id: str
    deployment: str
    status: int
    # "completed", "failed", "cancelled".
    outcome: str
    error: str
    tokens: Tokens
    cost: int
    price_version: str
    queue_ms: int
    first_token_ms: int
    duration_ms: int
    engine_ms: int
    # Deployments that were tried before, with the error of each.
    attempts: tuple[tuple[str, str], ...] = ()
    side: tuple[SideCharge, ...] = ()


class Closed(Struct, array_like=True, tag=4, frozen=True, gc=False):
    """The last record of a gateway that ended in order."""

    at_ms: int


Record = Admitted | Progressed | Settled | Closed

# A record with more is not written: what callers say (tags, ids) is bounded long before.
MAX_RECORD_BYTES: Final = 64 * 1024
# What the end of a call may take; so much is kept free for each that is under way.
MAX_SETTLEMENT_BYTES: Final = 2 * 1024

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final[msgspec.msgpack.Decoder[Record]] = msgspec.msgpack.Decoder(Record)


# The payload of one record. No function of ours: it would be called for each record.
encode_record: Final[Callable[[Record], bytes]] = _ENCODER.encode


def decode_record(payload: bytes) -> Record:
    """Raises `HelixError` UPSTREAM_INVALID for what is no record."""
    try:
        return _DECODER.decode(payload)
    except msgspec.DecodeError as exc:
        raise HelixError(ErrorKind.UPSTREAM_INVALID, "This is no record of a journal.") from exc
