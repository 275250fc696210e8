"""Usage, summed up, as JSON and as CSV."""

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from fastapi import Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from helixflow.console.endpoint import USAGE, Ask, endpoint
from helixflow.console.fields import GivenMoment, Identifier, ModelName, Moment, OptionalText, Shape
from helixflow.console.models import Shown
from helixflow.console.spreadsheet import MEDIA_TYPE, render_rows
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import usage_pb2

_TIMES: Final = ("hour", "day", "month")
_TAG: Final = "tag:"
_CSV_PAGE: Final = 1000
_MAX_VALUES: Final = 100
_NO_CONTROLS: Final = Shape(r"^[^\x00-\x1f\x7f]*$", "must not hold control characters")
_FIGURES: Final = (
    "requests",
    "failed_requests",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "cost",
)

GroupName = Annotated[str, Field(min_length=1, max_length=200, examples=["day"]), _NO_CONTROLS]
GroupBy = Annotated[
    list[GroupName] | None,
    Query(
        max_length=10,
        description="`key`, `project`, `user`, `model`, `deployment`, `operation`, `hour`, `day`, `month` or `tag:` "
        "and the name of a tag. Repeated, or with commas between; a tag comes last then.",
        examples=[["day", "project"]],
    ),
]
From = Annotated[
    GivenMoment | None,
    Query(alias="from", description="Requests admitted at or after this time; none: the 30 days before `to`."),
]
To = Annotated[
    GivenMoment | None, Query(alias="to", description="Requests admitted before this time; none: until now.")
]
_ProjectIds = Annotated[
    list[Identifier] | None,
    Query(max_length=_MAX_VALUES, description="Only these projects.", examples=[["proj_37913d99a1ae28e3195d7a1f"]]),
]
_KeyIds = Annotated[
    list[Identifier] | None,
    Query(max_length=_MAX_VALUES, description="Only these keys.", examples=[["key_37913d99a1ae28e3195d7a1f"]]),
]
_UserIds = Annotated[
    list[Identifier] | None,
    Query(
        max_length=_MAX_VALUES,
        description="Only these accounts and service accounts.",
        examples=[["user_6b86b273ff34fce19d6b804e"]],
    ),
]
_Models = Annotated[
    list[ModelName] | None,
    Query(max_length=_MAX_VALUES, description="Only these models.", examples=[["smollm2-135m-instruct"]]),
]
_Operations = Annotated[
    list[Literal["chat/completions", "completions", "embeddings"]] | None,
    Query(max_length=_MAX_VALUES, description="Only these operations.", examples=[["chat/completions"]]),
]
_Tag = Annotated[
    Annotated[str, Field(min_length=2, max_length=600), Shape(r"^[^\x00=]+=[^\x00]*$", "must be name=value")] | None,
    Query(description="Only requests with this tag, as `name=value`.", examples=["team=search"]),
]
_Format = Annotated[
    Literal["json", "csv"], Query(description="`csv`: all rows at once, without total; `limit` counts for JSON only.")
]


class UsageFigures(Shown):
    """What requests used in all."""

    requests: int = Field(description="Requests that were admitted.", examples=[120])
    failed_requests: int = Field(description="Those of them that failed.", examples=[2])
    prompt_tokens: int = Field(description="Tokens of prompts.", examples=[48_000])
    cached_tokens: int = Field(description="Those of them that the engine had cached.", examples=[9_000])
    completion_tokens: int = Field(description="Tokens that were generated.", examples=[31_000])
    reasoning_tokens: int = Field(description="Those of them that were reasoning.", examples=[0])
    cost: str = Field(description="What they cost, US dollars.", examples=["1.2345"])


class UsageEntry(UsageFigures):
    """What the requests of one group used."""

    group: dict[str, str] = Field(
        description="The values by the names of `group_by`; times are when the hour, day or month begins.",
        examples=[{"day": "2026-11-23T00:00:00Z", "project": "proj_37913d99a1ae28e3195d7a1f"}],
    )


class UsageReport(Shown):
    """Usage by groups, in their order: one page, and the total of all pages."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    from_: Moment = Field(alias="from", description="Begin of what was summed up: whole hours or days.")
    to: Moment = Field(description="End of it, not included.")
    data: list[UsageEntry] = Field(description="The entries of this page.")
    total: UsageFigures = Field(description="All entries of all pages together.")
    next_cursor: OptionalText = Field(
        description="Give it as `cursor` to get the next page; null after the last one.",
        examples=["WzE3NjM4MzcxMDAsImtleV8xIl0"],
    )


async def _report(ask: Ask, request: usage_pb2.QueryUsageRequest, given: Mapping[str, Any]) -> BaseModel | Response:
    if given["format"] == "csv":
        if request.cursor:
            message = "A table has all rows: leave the cursor out."
            raise HelixError(ErrorKind.UNPROCESSABLE, message, param="cursor")
        request.page_size = _CSV_PAGE
        # The first page before the head: until then an error can become a status.
        first = await ask(USAGE["QueryUsage"], request)
        return StreamingResponse(_table(ask, request, first), media_type=MEDIA_TYPE, headers=_AS_FILE)
    answer = await ask(USAGE["QueryUsage"], request)
    names = list(request.group_by)
    entries = [
        UsageEntry(group=dict(zip(names, _shown(names, row.group), strict=True)), **_figures(row))
        for row in answer.rows
    ]
    return UsageReport(
        from_=getattr(answer, "from"),
        to=answer.to,
        data=entries,
        total=UsageFigures(**_figures(answer.total)),
        next_cursor=answer.next_cursor,
    )


_AS_FILE: Final = {"content-disposition": 'attachment; filename="usage.csv"'}


async def _table(ask: Ask, request: usage_pb2.QueryUsageRequest, page: Any) -> AsyncIterator[bytes]:
    names = list(request.group_by)
    yield render_rows([[*names, *_FIGURES]])
    while True:
        yield render_rows([*_shown(names, row.group), *_figures(row).values()] for row in page.rows)
        if not page.next_cursor:
            return
        request.cursor = page.next_cursor
        page = await ask(USAGE["QueryUsage"], request)


def _figures(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in _FIGURES}


def _shown(names: Sequence[str], group: Sequence[str]) -> list[str]:
    return [_time(value) if name in _TIMES else value for name, value in zip(names, group, strict=True)]


def _time(seconds: str) -> str:
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _split(given: Sequence[str]) -> list[str]:
    """Names with commas between; the name of a tag may hold commas, so that it is the last one."""
    names: list[str] = []
    for text in given:
        plain, found, tag = f",{text}".partition(f",{_TAG}")
        names += [name.strip() for name in plain.split(",")[1:]]
        if found:
            names.append(_TAG + tag)
    return names


@endpoint("GET", "/usage", USAGE["QueryUsage"], UsageReport, compose=_report, media_type=MEDIA_TYPE)
def query_usage(
    group_by: GroupBy = None,
    since: From = None,
    until: To = None,
    project_id: _ProjectIds = None,
    key_id: _KeyIds = None,
    user_id: _UserIds = None,
    model: _Models = None,
    operation: _Operations = None,
    tag: _Tag = None,
    format: _Format = "json",
) -> usage_pb2.QueryUsageRequest:
    """What requests used and cost, by groups. A range is extended to whole hours (UTC), with a tag to whole days: tags
    are summed up by days, each by itself. By the hour 31 days at most, else two years. Requests show up within seconds.
    """
    request = usage_pb2.QueryUsageRequest(
        to=until or 0,
        group_by=_split(group_by or ()),
        project_ids=project_id or (),
        key_ids=key_id or (),
        user_ids=user_id or (),
        models=model or (),
        operations=operation or (),
        tag=tag or "",
    )
    setattr(request, "from", since or 0)  # a keyword of Python
    return request


ENDPOINTS = (query_usage,)
