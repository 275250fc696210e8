"""The parameters of OpenAI's usage and costs endpoints, as its API reference has them. Parsed without I/O."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from helixflow.core.call import Operation
from helixflow.core.errors import ErrorKind, HelixError

MAX_TIME: Final = 253_402_300_799  # the end of the year 9999
MAX_SPAN_S: Final = 2 * 366 * 86_400
_MAX_VALUES: Final = 100
_MAX_CHARS: Final = 200
_WIDTHS_S: Final = {"1h": 3600, "1d": 86_400}
_NUMBER: Final = re.compile(r"[0-9]{1,12}")
_PAGE: Final = re.compile(r"page_([0-9]{1,12})")
_LISTS: Final = ("project_ids", "user_ids", "api_key_ids", "models", "line_items", "group_by")
_COMMON: Final = frozenset({"start_time", "end_time", "bucket_width", "limit", "page", "group_by", "project_ids"})


@dataclass(frozen=True, slots=True)
class Kind:
    """One of the endpoints. `operations`: what it is about, none for all. `groups`: our names of what it can group by.
    `limits`: for each width of buckets how many a page has by default, and at most.
    """

    object: str
    operations: tuple[Operation, ...]
    groups: Mapping[str, str]
    limits: Mapping[str, tuple[int, int]]
    parameters: frozenset[str]


_GROUPS: Final = {"project_id": "project", "user_id": "user", "api_key_id": "key"}
_USAGE_LIMITS: Final = {"1h": (24, 168), "1d": (7, 31)}
_USAGE: Final = _COMMON | {"user_ids", "api_key_ids", "models"}
COMPLETIONS: Final = Kind(
    "organization.usage.completions.result",
    (Operation.CHAT, Operation.COMPLETIONS),
    # Nothing runs in batches here: a group of its own for all.
    {**_GROUPS, "model": "model", "batch": ""},
    _USAGE_LIMITS,
    _USAGE | {"batch"},
)
EMBEDDINGS: Final = Kind(
    "organization.usage.embeddings.result",
    (Operation.EMBEDDINGS,),
    {**_GROUPS, "model": "model"},
    _USAGE_LIMITS,
    frozenset(_USAGE),
)
COSTS: Final = Kind(
    "organization.costs.result",
    (),
    {**_GROUPS, "line_item": "model"},
    {"1d": (7, 180)},
    _COMMON | {"api_key_ids", "line_items"},
)


@dataclass(frozen=True, slots=True)
class Parameters:
    """Times are seconds since the epoch, multiples of `width_s`: all that is asked for is from `start` to `end`, the
    page from `page_start` to `page_end`.
    """

    start: int
    end: int
    page_start: int
    page_end: int
    width_s: int
    groups: tuple[str, ...]
    project_ids: tuple[str, ...]
    user_ids: tuple[str, ...]
    api_key_ids: tuple[str, ...]
    models: tuple[str, ...]
    # False: only what ran in batches is asked for, and nothing does.
    any: bool

    @property
    def next_page(self) -> str | None:
        return f"page_{self.page_end}" if self.page_end < self.end else None


def parse_parameters(kind: Kind, items: Iterable[tuple[str, str]], now: int) -> Parameters:
    """`items` are the query's names and values; lists as `name=a&name=b` or `name[]=a`. Raises `HelixError`
    INVALID_VALUE, UNSUPPORTED or INVALID_REQUEST that names the parameter.
    """
    single, lists = _sort_out(kind, items)
    width = _width(kind, single.get("bucket_width", "1d"))
    width_s = _WIDTHS_S[width]
    if "start_time" not in single:
        raise _wrong("start_time", "start_time is required: seconds since the epoch.")
    start, end = _time("start_time", single["start_time"]), now + 1
    if "end_time" in single:
        end = _time("end_time", single["end_time"])
    if start >= end:
        raise _wrong("start_time", "start_time must lie before end_time.")
    if end - start > MAX_SPAN_S:
        raise _wrong("start_time", "Ask for two years at most.")
    start, end = start - start % width_s, -(-end // width_s) * width_s
    page_start = _page_start(single.get("page"), start, end, width_s)
    limit = _limit(single.get("limit"), *kind.limits[width])
    return Parameters(
        start=start,
        end=end,
        page_start=page_start,
        page_end=min(end, page_start + limit * width_s),
        width_s=width_s,
        groups=_groups(kind, lists.get("group_by", ())),
        project_ids=lists.get("project_ids", ()),
        user_ids=lists.get("user_ids", ()),
        api_key_ids=lists.get("api_key_ids", ()),
        models=lists.get("models", ()) or lists.get("line_items", ()),
        any=not _flag(single.get("batch", "false")),
    )


def _sort_out(kind: Kind, items: Iterable[tuple[str, str]]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    single: dict[str, str] = {}
    lists: dict[str, tuple[str, ...]] = {}
    for given, value in items:
        name = given.removesuffix("[]")
        if name not in kind.parameters:
            shown = "".join(c if c.isprintable() else "?" for c in given[:100])
            raise HelixError(ErrorKind.INVALID_REQUEST, f"Unrecognized request argument: {shown}.", param=shown)
        if not 1 <= len(value) <= _MAX_CHARS or "\0" in value:
            raise _wrong(name, f"A value of {name} has 1 to {_MAX_CHARS} characters.")
        if name in _LISTS:
            lists[name] = (*lists.get(name, ()), value)
            if len(lists[name]) > _MAX_VALUES:
                raise _wrong(name, f"{name} has {_MAX_VALUES} values at most.")
        elif name in single:
            raise _wrong(name, f"Give {name} once.")
        else:
            single[name] = value
    return single, lists


def _width(kind: Kind, width: str) -> str:
    if width in kind.limits:
        return width
    known = " and ".join(kind.limits)
    if width == "1m":
        message = f"Usage is not kept by minutes; bucket_width can be {known}."
        raise HelixError(ErrorKind.UNSUPPORTED, message, param="bucket_width")
    raise _wrong("bucket_width", f"bucket_width can be {known}.")


def _time(name: str, text: str) -> int:
    if not _NUMBER.fullmatch(text) or int(text) > MAX_TIME:
        raise _wrong(name, f"{name} is a number of seconds since the epoch.")
    return int(text)


def _limit(text: str | None, default: int, most: int) -> int:
    if text is None:
        return default
    if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= most:
        raise _wrong("limit", f"limit is a number of buckets from 1 to {most}.")
    return int(text)


def _page_start(text: str | None, start: int, end: int, width_s: int) -> int:
    if text is None:
        return start
    match = _PAGE.fullmatch(text)
    if match is None or not start <= int(match[1]) < end or int(match[1]) % width_s:
        raise _wrong("page", "page is not the next_page of an answer to the same question.")
    return int(match[1])


def _groups(kind: Kind, given: tuple[str, ...]) -> tuple[str, ...]:
    for index, name in enumerate(given):
        if name not in kind.groups:
            message = f"This cannot be grouped by; known: {', '.join(kind.groups)}."
            raise HelixError(ErrorKind.UNSUPPORTED, message, param=f"group_by[{index}]")
    return tuple(dict.fromkeys(given))


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise _wrong("batch", "batch is true or false.")
    return text == "true"


def _wrong(param: str, message: str) -> HelixError:
    return HelixError(ErrorKind.INVALID_VALUE, message, param=param)
