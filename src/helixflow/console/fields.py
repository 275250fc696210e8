"""The types of fields in requests and answers: what is enforced, said to callers, and written into the OpenAPI document
comes from one declaration each.
"""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

from helixflow.core.permissions import OPERATOR_SCOPES, ROLE_PERMISSIONS

MAX_TIME: Final = 253_402_300_799  # the end of the year 9999
MAX_LIST: Final = 100


@dataclass(frozen=True, slots=True)
class Shape:
    """A string that matches `pattern` as a whole; `message` says so in words, without repeating what was given."""

    pattern: str
    message: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        pattern = re.compile(self.pattern)

        def check(text: str) -> str:
            if pattern.fullmatch(text) is None:
                raise ValueError(self.message)
            return text

        return core_schema.no_info_after_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "pattern": self.pattern}


_NO_NUL: Final = Shape(r"^[^\x00]*$", "must not hold NUL characters")

Name = Annotated[
    str,
    Field(min_length=1, max_length=100, examples=["Research"]),
    Shape(
        r"^[^\x00-\x1f\x7f-\x9f]*[^\x00-\x20\x7f-\xa0][^\x00-\x1f\x7f-\x9f]*$",
        "must be 1 to 100 printable characters, not all of them spaces",
    ),
]
Email = Annotated[
    str,
    Field(min_length=3, max_length=254, examples=["ada@example.com"]),
    Shape(
        r'^[^\x00-\x20\x7f-\xa0@"(),:;<>\[\\\]]{1,64}@[^\x00-\x20\x7f-\xa0@"(),:;<>\[\\\]]{1,189}$',
        "must look like name@example.com",
    ),
]
# Signing in tells nothing about what an e-mail must look like.
AnyEmail = Annotated[str, Field(min_length=1, max_length=254, examples=["ada@example.com"]), _NO_NUL]
Password = Annotated[str, Field(min_length=1, max_length=1024, examples=["correct horse battery staple"]), _NO_NUL]
Token = Annotated[
    str,
    Field(min_length=1, max_length=200, examples=["hft_0123456789"]),
    Shape(r"^[\x21-\x7e]+$", "must be visible ASCII characters"),
]
Code = Annotated[
    str,
    Field(min_length=1, max_length=64, examples=["123456"]),
    Shape(r"^[0-9A-Za-z -]+$", "must be a code of six digits or a recovery code"),
]
RoleName = Annotated[
    str,
    Field(min_length=1, max_length=50, examples=["developer"]),
    Shape(r"^[a-z][a-z0-9_-]*$", "must be lower-case letters, digits, - and _, beginning with a letter"),
]
Description = Annotated[str, Field(max_length=500, examples=["Sees the usage, changes nothing."]), _NO_NUL]
Identifier = Annotated[
    str,
    Field(min_length=1, max_length=64),
    Shape(r"^[0-9A-Za-z_-]+$", "must be letters, digits, - and _"),
]
OptionalProject = Annotated[Identifier | None, Field(examples=["proj_37913d99a1ae28e3195d7a1f"])]
ModelName = Annotated[
    str,
    Field(min_length=1, max_length=200, examples=["smollm2-135m-instruct"]),
    Shape(r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$", "must be the name of a model"),
]
Network = Annotated[
    str,
    Field(min_length=2, max_length=50, examples=["203.0.113.0/24"]),
    Shape(r"^[0-9A-Fa-f.:]+(/[0-9]{1,3})?$", "must be an address or a network such as 203.0.113.0/24"),
]
Action = Annotated[
    str,
    Field(min_length=1, max_length=64, examples=["create_project"]),
    Shape(r"^[a-z_]+$", "must be the name of an action such as create_project"),
]
Cursor = Annotated[
    str,
    # As long as values of tags make it.
    Field(min_length=1, max_length=8192, examples=["WzE3NjM4MzcxMDAsImtleV8xIl0"]),
    Shape(r"^[0-9A-Za-z_=-]+$", "must be the next_cursor of the page before"),
]

_PERMISSIONS: Final = sorted(permission.value for permission in ROLE_PERMISSIONS)
_SCOPES: Final = sorted(permission.value for permission in ROLE_PERMISSIONS | OPERATOR_SCOPES)


def _one_of(names: list[str]) -> BeforeValidator:
    def check(value: object) -> object:
        if isinstance(value, str) and value not in names:
            raise ValueError("must be one of the permissions that docs/reference/roles.md lists")
        return value

    return BeforeValidator(check)


PermissionName = Annotated[
    str,
    _one_of(_PERMISSIONS),
    Field(examples=["keys:read"]),
    WithJsonSchema({"type": "string", "enum": _PERMISSIONS}),
]
# What an API key may have: beyond roles, what operators may give it.
ScopeName = Annotated[
    str,
    _one_of(_SCOPES),
    Field(examples=["models:use"]),
    WithJsonSchema({"type": "string", "enum": _SCOPES}),
]

_MOMENT: Final = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt]([0-9]{2}:[0-9]{2}):([0-9]{2})(?:\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_MOMENT_MESSAGE: Final = "must be a time such as 2027-01-31T00:00:00Z, in the years 1970 to 9999"


def parse_moment(value: object) -> int:
    """Whole seconds since the epoch of an RFC 3339 time. Raises `ValueError` for anything else."""
    match = _MOMENT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(_MOMENT_MESSAGE)
    date, minute, second, zone = match.groups()
    leap = second == "60"
    try:
        moment = datetime.fromisoformat(f"{date}T{minute}:{'59' if leap else second}{zone.upper()}")
    except ValueError as exc:
        raise ValueError(_MOMENT_MESSAGE) from exc
    at = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1) + leap
    if not 1 <= at <= MAX_TIME:
        raise ValueError(_MOMENT_MESSAGE)
    return at


# In requests: seconds since the epoch from here on.
GivenMoment = Annotated[
    int,
    BeforeValidator(parse_moment),
    WithJsonSchema({"type": "string", "format": "date-time", "examples": ["2027-01-31T00:00:00Z"]}),
]


def _parse_flag(value: object) -> object:
    flags = {"true": True, "false": False}
    if isinstance(value, str) and value not in flags:
        raise ValueError("must be true or false")
    return flags.get(value, value) if isinstance(value, str) else value


# In queries, where everything is text.
GivenFlag = Annotated[bool, BeforeValidator(_parse_flag)]


def _to_datetime(value: object) -> object:
    if isinstance(value, int):
        return datetime.fromtimestamp(min(value, MAX_TIME), UTC) if value > 0 else None
    return value


# In answers: the proto's seconds, '' and 0 become times and nulls.
Moment = Annotated[datetime, BeforeValidator(_to_datetime), Field(examples=["2026-11-23T09:30:00Z"])]
OptionalMoment = Annotated[datetime | None, BeforeValidator(_to_datetime), Field(examples=["2027-01-31T00:00:00Z"])]
# Of milliseconds; negative: there is none.
MomentMs = Annotated[
    datetime,
    BeforeValidator(lambda value: datetime.fromtimestamp(value / 1000, UTC) if isinstance(value, int) else value),
    Field(examples=["2026-11-23T09:30:00.125Z"]),
]
OptionalMs = Annotated[int | None, BeforeValidator(lambda value: value if value is None or value >= 0 else None)]
Weight = Annotated[int, Field(ge=1, le=10_000, examples=[100])]
Region = Annotated[
    str,
    Field(max_length=63, examples=["eu"]),
    Shape(r"^([a-z0-9]([a-z0-9._-]*[a-z0-9])?)?$", "must be a region such as 'eu', or empty"),
]
OptionalText = Annotated[str | None, BeforeValidator(lambda value: value or None)]
OptionalId = Annotated[OptionalText, Field(examples=["proj_37913d99a1ae28e3195d7a1f"])]
Texts = Annotated[list[str], BeforeValidator(list)]
Hash = Annotated[
    str,
    BeforeValidator(lambda value: value.hex() if isinstance(value, bytes) else value),
    Field(examples=["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"]),
]


def _to_object(value: object) -> object:
    return json.loads(value) if isinstance(value, str) and value else None


JsonObject = Annotated[
    dict[str, Any] | None, BeforeValidator(_to_object), Field(examples=[{"name": "Research", "version": 1}])
]
