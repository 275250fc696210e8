"""Finished requests as they travel from a journal to the ledger."""

from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import Struct

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.journal.records import Admitted, SideCharge, Tokens


class Explanation(Struct, frozen=True, omit_defaults=True):
    """Why a request went as it went; JSON in the ledger."""

    authorised_by: str = ""
    policies: tuple[str, ...] = ()
    reserved_tokens: int = 0
    reserved_cost: int = 0
    attempts: tuple[tuple[str, str], ...] = ()
    journal_id: str = ""
    # Part of the row's cost, of other deployments than the row's; its tokens are not among the row's.
    side: tuple[SideCharge, ...] = ()


class RequestRow(Struct, array_like=True, frozen=True, gc=False):
    """One row of the ledger; the fields are the columns of `storage.schema.requests`."""

    call_id: str
    admitted_at_ms: int
    request_id: str
    organisation_id: str
    project_id: str
    key_id: str
    user_id: str
    model: str
    deployment: str
    dialect: str
    operation: str
    stream: bool
    status: int
    outcome: str
    error: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    estimated: bool
    queue_ms: int
    first_token_ms: int
    duration_ms: int
    engine_ms: int
    cost: int
    price_version: str
    tags: str = ""
    explanation: str = ""


Positioned = tuple[int, RequestRow]

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(list[Positioned])
_JSON: Final = msgspec.json.Encoder(order="deterministic")


def make_row(
    admitted: Admitted,
    tokens: Tokens,
    *,
    journal_id: str,
    deployment: str,
    status: int,
    outcome: str,
    error: str = "",
    cost: int = 0,
    price_version: str = "",
    queue_ms: int = -1,
    first_token_ms: int = -1,
    duration_ms: int = -1,
    engine_ms: int = -1,
    attempts: tuple[tuple[str, str], ...] = (),
    side: tuple[SideCharge, ...] = (),
) -> RequestRow:
    """The row of a call that was admitted so and ended so."""
    explanation = Explanation(
        admitted.authorised_by,
        admitted.policies,
        admitted.reserved_tokens,
        admitted.reserved_cost,
        attempts,
        journal_id,
        side,
    )
    return RequestRow(
        admitted.call_id,
        admitted.admitted_at_ms,
        admitted.request_id,
        admitted.organisation_id,
        admitted.project_id,
        admitted.key_id,
        admitted.user_id,
        admitted.model,
        deployment,
        admitted.dialect,
        admitted.operation,
        admitted.stream,
        status,
        outcome,
        error,
        tokens.prompt,
        tokens.cached,
        tokens.completion,
        tokens.reasoning,
        not tokens.reported,
        queue_ms,
        first_token_ms,
        duration_ms,
        engine_ms,
        cost,
        price_version,
        _JSON.encode(admitted.tags).decode() if admitted.tags else "",
        _JSON.encode(explanation).decode(),
    )


def encode_rows(rows: Sequence[Positioned]) -> bytes:
    """(position in the journal, row) pairs as MessagePack."""
    return _ENCODER.encode(rows)


def decode_rows(data: bytes) -> list[Positioned]:
    """Raises `HelixError` INVALID_VALUE for what is not that."""
    try:
        return _DECODER.decode(data)
    except msgspec.DecodeError as exc:
        raise HelixError(ErrorKind.INVALID_VALUE, "These are no rows of a journal.", param="rows") from exc


COLUMNS: Final = RequestRow.__struct_fields__
