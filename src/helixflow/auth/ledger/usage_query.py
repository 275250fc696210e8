"""What a question about usage asks for: which roll-ups answer it, for which times, grouped by what. Without I/O."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from typing import Final, NamedTuple

import msgspec

from helixflow.core.call import Operation
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb

DEFAULT_SPAN_S: Final = 30 * 86_400
MAX_HOURLY_SPAN_S: Final = 31 * 86_400
MAX_SPAN_S: Final = 2 * 366 * 86_400
MAX_TIME: Final = 253_402_300_799  # the end of the year 9999
MAX_GROUPS: Final = 6
TAG: Final = "tag:"
COLUMNS: Final = {
    "key": "key_id",
    "project": "project_id",
    "user": "user_id",
    "model": "model",
    "deployment": "deployment",
    "operation": "operation",
}
_OPERATIONS: Final = frozenset(operation.value for operation in Operation)
TIMES: Final = ("hour", "day", "month")
# Names and values of tags are bounded where they come in; six groups of text in base64 fit.
_MAX_TAG_NAME: Final = 64
_MAX_CURSOR: Final = 8192

# The values of the groups of a row.
Position = tuple[int | str, ...]


class Grain(IntEnum):
    """How finely a roll-up keeps time, seconds."""

    HOUR = 3600
    DAY = 86_400


class Part(NamedTuple):
    """A range of time, and the roll-up that answers for it: the one of hours, or one of days."""

    grain: Grain
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """From `start`, before `end` (seconds since the epoch): whole hours, for a tag whole days.

    `tag` is the name of the one tag that is asked for, be it as a group or as a filter, '' for none; `tag_value` the
    value that it must have, None for any.
    """

    start: int
    end: int
    groups: tuple[str, ...]
    tag: str
    tag_value: str | None

    def parts(self) -> list[Part]:
        """What the range consists of, one after the other: hours only where there is no whole day, or hours are asked
        for. There are more than ten times as many of them.
        """
        first, last = _round_up(self.start, Grain.DAY), self.end - self.end % Grain.DAY
        if "hour" in self.groups or first >= last:
            return [Part(Grain.HOUR, self.start, self.end)]
        parts = (
            Part(Grain.HOUR, self.start, first),
            Part(Grain.DAY, first, last),
            Part(Grain.HOUR, last, self.end),
        )
        return [part for part in parts if part.start < part.end]

    def month_starts(self) -> list[int]:
        """The beginnings of all months that the time touches, in UTC."""
        moment = datetime.fromtimestamp(self.start, UTC)
        year, month = moment.year, moment.month
        starts: list[int] = []
        while (start := int(datetime(year, month, 1, tzinfo=UTC).timestamp())) < self.end:
            starts.append(start)
            year, month = (year, month + 1) if month < 12 else (year + 1, 1)
        return starts


def parse_usage_query(request: pb.QueryUsageRequest, now: int) -> UsageQuery:
    """Raises `HelixError` UNPROCESSABLE that names the field."""
    groups = _parse_groups(request.group_by)
    tag, tag_value = _parse_tag(groups, request.tag)
    if not _OPERATIONS.issuperset(request.operations):
        raise _wrong("operation", f"There is no such operation; known: {', '.join(sorted(_OPERATIONS))}.")
    hourly = "hour" in groups
    # Nothing is in the future: the whole day, where nobody asks for hours, is until now as well.
    until = now + 1 if hourly else now - now % Grain.DAY + Grain.DAY
    start, end = parse_range(getattr(request, "from"), request.to or until, now)
    if end - start > MAX_SPAN_S:
        raise _wrong("from", "Ask for two years at most.")
    if hourly and tag:
        raise _wrong("group_by", "Tags are summed up by days, not by hours.")
    if hourly and end - start > MAX_HOURLY_SPAN_S:
        raise _wrong("from", "Ask for 31 days at most by the hour.")
    grain = Grain.DAY if tag else Grain.HOUR
    return UsageQuery(start - start % grain, _round_up(end, grain), groups, tag, tag_value)


def parse_range(start: int, end: int, now: int) -> tuple[int, int]:
    """The default range, where 0 was given: until now, and the 30 days before the end. Raises as above."""
    end = end or now + 1
    start = start or max(0, end - DEFAULT_SPAN_S)
    if not 0 <= start <= MAX_TIME or not 0 < end <= MAX_TIME:
        raise _wrong("from", "Times are seconds since the epoch, up to the year 9999.")
    if start >= end:
        raise _wrong("from", "The range must begin before it ends.")
    return start, end


def encode_position(position: Position) -> str:
    """A cursor: the next page begins after the row with these groups."""
    return base64.urlsafe_b64encode(msgspec.json.encode(position)).decode().rstrip("=")


def decode_position(cursor: str, groups: Sequence[str]) -> Position:
    """Raises `HelixError` UNPROCESSABLE for a cursor that is not ours, or of a list with other groups."""
    try:
        if len(cursor) > _MAX_CURSOR:
            raise ValueError("too long")
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        position = _decoder.decode(text)
        if [type(value) for value in position] != [int if group in TIMES else str for group in groups]:
            raise ValueError("of another list")
        if any("\0" in value if isinstance(value, str) else not 0 <= value <= MAX_TIME for value in position):
            raise ValueError("out of range")
    except (ValueError, binascii.Error, msgspec.MsgspecError) as exc:
        raise _wrong("cursor", "The cursor is not one that this list gave.") from exc
    return position


_decoder: Final = msgspec.json.Decoder(Position)


def _parse_groups(names: Sequence[str]) -> tuple[str, ...]:
    if len(names) > MAX_GROUPS:
        raise _wrong("group_by", f"Group by {MAX_GROUPS} things at most.")
    for index, name in enumerate(names):
        param = f"group_by[{index}]"
        if name.startswith(TAG):
            if not 1 <= len(name) - len(TAG) <= _MAX_TAG_NAME:
                raise _wrong(param, f"The name of a tag has 1 to {_MAX_TAG_NAME} characters.")
            if any(other.startswith(TAG) for other in names[:index]):
                raise _wrong(param, "Group by one tag: each is summed up by itself.")
        elif name not in COLUMNS and name not in TIMES:
            known = ", ".join((*COLUMNS, *TIMES, f"{TAG}<name>"))
            raise _wrong(param, f"Usage is not kept by that; known: {known}.")
        if name in names[:index]:
            raise _wrong(param, "Name this once.")
    return tuple(names)


def _parse_tag(groups: Sequence[str], text: str) -> tuple[str, str | None]:
    grouped = next((group.removeprefix(TAG) for group in groups if group.startswith(TAG)), "")
    if not text:
        return grouped, None
    name, found, value = text.partition("=")
    if not found or not 1 <= len(name) <= _MAX_TAG_NAME:
        raise _wrong("tag", "Give a tag as name=value.")
    if grouped not in ("", name):
        raise _wrong("tag", "Filter by the tag that is grouped by: each is summed up by itself.")
    return name, value


def _round_up(time: int, grain: Grain) -> int:
    return -(-time // grain) * grain


def _wrong(param: str, message: str) -> HelixError:
    return HelixError(ErrorKind.UNPROCESSABLE, message, param=param)
