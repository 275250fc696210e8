"""Rows of a shipment as the ledger takes them: checked, as tuples for the database, and added up for the roll-ups."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import add
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import astuple

from helixflow.core.errors import ErrorKind, HelixError

# In one transaction, which others wait for: 2,000 rows take about 50 ms.
MAX_ROWS: Final = 5_000
# The columns of the key of `usage_hourly` and `usage_daily`.
_KEYS: Final = 8
_HOUR_MS: Final = 3_600_000
_HOUR_S: Final = 3_600
_DAY_MS: Final = 86_400_000
_DAY_S: Final = 86_400

# For those of all rows together: a pattern for each would take longer than all the rest.
_HEX: Final = re.compile("[0-9a-f]*")

# What a database cannot store would come again for ever.
_CallId = Annotated[str, Meta(min_length=32, max_length=32)]
_Id = Annotated[str, Meta(max_length=64)]
_Name = Annotated[str, Meta(max_length=256)]
_Text = Annotated[str, Meta(max_length=1024)]
_Json = Annotated[str, Meta(max_length=128 * 1024)]
_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Duration = Annotated[int, Meta(ge=-1, le=2**53)]

RollUp = list[tuple[Any, ...]]


class LedgerRow(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """`metering.rows.RequestRow` of this version, with its bounds; a newer one with more fields is refused."""

    call_id: _CallId
    admitted_at_ms: _Count
    request_id: _Name
    organisation_id: _Id
    project_id: _Id
    key_id: _Id
    user_id: _Id
    model: _Name
    deployment: _Name
    dialect: _Id
    operation: _Id
    stream: bool
    status: Annotated[int, Meta(ge=0, le=999)]
    outcome: _Id
    error: _Text
    prompt_tokens: _Count
    cached_tokens: _Count
    completion_tokens: _Count
    reasoning_tokens: _Count
    estimated: bool
    queue_ms: _Duration
    first_token_ms: _Duration
    duration_ms: _Duration
    engine_ms: _Duration
    cost: _Count
    price_version: _Id
    tags: _Json = ""
    explanation: _Json = ""


_Position = Annotated[int, Meta(ge=0, le=2**62)]
COLUMNS: Final = LedgerRow.__struct_fields__
_ROWS: Final = msgspec.msgpack.Decoder(Annotated[list[tuple[_Position, LedgerRow]], Meta(max_length=MAX_ROWS)])
_TAGS: Final = msgspec.json.Decoder(dict[_Id, _Text])
# A key of an index of PostgreSQL has at most 2,704 bytes. 512 characters, as many as a value may have, are more only if
# they are of four bytes each.
_MAX_VALUE_BYTES: Final = 1_536


class Batch:
    """Rows in the order of their journal, `positions` growing.

    `values` are the rows of `requests`; `hourly`, `daily` and `tagged` what they add to `usage_hourly`, `usage_daily`
    and `usage_daily_tags`: tuples of all columns, no key twice.
    """

    def __init__(self, positions: Sequence[int], rows: Sequence[LedgerRow]) -> None:
        self.positions = positions
        self.rows = rows
        self.values = list(map(astuple, rows))
        self.hourly = _sum_hours(rows)
        self.daily = _sum_days(self.hourly)
        self.tagged = _sum_tags(rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def organisation_ids(self) -> frozenset[str]:
        return frozenset(row.organisation_id for row in self.rows)

    def after(self, position: int) -> "Batch":
        """Those after `position` in the journal; itself when that is all."""
        begin = bisect_right(self.positions, position)
        return Batch(self.positions[begin:], self.rows[begin:]) if begin else self

    def without(self, known: set[tuple[str, int]]) -> "Batch":
        """Those whose (call id, admission) is not known, and none twice."""
        seen = set(known)
        left = []
        for position, row in zip(self.positions, self.rows, strict=True):
            identity = row.call_id, row.admitted_at_ms
            if identity not in seen:
                seen.add(identity)
                left.append((position, row))
        return Batch([position for position, _ in left], [row for _, row in left])


def decode_batch(data: bytes) -> Batch:
    """Reads `metering.rows.encode_rows`. Takes about 13 ms for 2,000 rows: not on the event loop.

    Raises `HelixError` INVALID_VALUE for what is not that, is of a newer version, goes backwards or cannot be stored.
    """
    try:
        pairs = _ROWS.decode(data) if data else []
        batch = Batch([position for position, _ in pairs], [row for _, row in pairs])
    except msgspec.DecodeError as exc:
        # Says what was expected and where, and no value.
        raise _invalid(f"These rows are not of a format that this ledger knows: {exc}.") from exc
    if any(later <= earlier for earlier, later in pairwise(batch.positions)):
        raise _invalid("The positions of rows must grow.")
    columns = dict(zip(COLUMNS, zip(*batch.values, strict=True), strict=False))
    if not _HEX.fullmatch("".join(columns.get("call_id", ()))):
        raise _invalid("A call id is 32 hexadecimal digits, in lower case.")
    # PostgreSQL stores none, and behaves as SQLite does.
    for name, values in columns.items():
        if isinstance(values[0], str) and "\0" in "".join(values):
            raise _invalid(f"There is a NUL in {name}.")
    return batch


def _invalid(message: str) -> HelixError:
    return HelixError(ErrorKind.INVALID_VALUE, message, param="rows")


# By all columns of the key of a roll-up: the others, which are sums.
_Sums = dict[tuple[Any, ...], list[int]]


def _sum_hours(rows: Iterable[LedgerRow]) -> RollUp:
    sums: _Sums = {}
    for row in rows:
        start = row.admitted_at_ms // _HOUR_MS * _HOUR_S
        _add_row(sums, (row.organisation_id, start, *_subject(row)), row)
    return _flatten(sums)


def _sum_days(hours: RollUp) -> RollUp:
    sums: _Sums = {}
    for row in hours:
        key = row[0], row[1] // _DAY_S * _DAY_S, *row[2:_KEYS]
        known = sums.get(key)
        sums[key] = list(row[_KEYS:]) if known is None else list(map(add, known, row[_KEYS:]))
    return _flatten(sums)


def _sum_tags(rows: Iterable[LedgerRow]) -> RollUp:
    sums: _Sums = {}
    for row in rows:
        if row.tags:
            start = row.admitted_at_ms // _DAY_MS * _DAY_S
            for tag, value in _TAGS.decode(row.tags).items():
                _add_row(sums, (row.organisation_id, start, _storable(tag), _storable(value), *_subject(row)), row)
    return _flatten(sums)


def _storable(text: str) -> str:
    """Clients choose tags: they must not keep a journal from being shipped."""
    if "\0" in text:
        text = text.replace("\0", "\N{REPLACEMENT CHARACTER}")
    if 4 * len(text) > _MAX_VALUE_BYTES:
        text = text.encode()[:_MAX_VALUE_BYTES].decode(errors="ignore")
    return text


def _subject(row: LedgerRow) -> tuple[str, ...]:
    """The last columns of the key of a roll-up."""
    return row.project_id, row.key_id, row.user_id, row.model, row.deployment, row.operation


def _add_row(sums: _Sums, key: tuple[Any, ...], row: LedgerRow) -> None:
    # One by one: anything more elegant takes half as long again, and this is done several times for each row.
    known = sums.get(key)
    if known is None:
        sums[key] = [
            1,
            int(row.outcome == "failed"),
            row.prompt_tokens,
            row.cached_tokens,
            row.completion_tokens,
            row.reasoning_tokens,
            row.cost,
        ]
    else:
        known[0] += 1
        known[1] += row.outcome == "failed"
        known[2] += row.prompt_tokens
        known[3] += row.cached_tokens
        known[4] += row.completion_tokens
        known[5] += row.reasoning_tokens
        known[6] += row.cost


def _flatten(sums: _Sums) -> RollUp:
    """In the order of keys, which is that of the index."""
    return sorted((*key, *amounts) for key, amounts in sums.items())
