"""The parameters of OpenAI's usage endpoints."""

from typing import Any

import pytest

from helixflow.console.openai_parameters import (
    COMPLETIONS,
    COSTS,
    EMBEDDINGS,
    Kind,
    Parameters,
    parse_parameters,
)
from helixflow.core.errors import ErrorKind, HelixError

HOUR, DAY = 3600, 86_400
# 2026-11-23 04:00 UTC.
NOW = 1_795_406_400
TODAY = NOW - 4 * HOUR


def parse(kind: Kind = COMPLETIONS, *items: tuple[str, str], **single: Any) -> Parameters:
    return parse_parameters(kind, [*((name, str(value)) for name, value in single.items()), *items], NOW)


def refused(param: str, kind: Kind = COMPLETIONS, *items: tuple[str, str], **single: Any) -> HelixError:
    with pytest.raises(HelixError) as caught:
        parse(kind, *items, **single)
    assert caught.value.param == param
    assert caught.value.traits.http == 400
    return caught.value


def test_buckets_are_whole_days_in_utc_seven_of_them_by_default() -> None:
    found = parse(start_time=TODAY - 9 * DAY + 5)
    assert (found.start, found.end, found.width_s) == (TODAY - 9 * DAY, TODAY + DAY, DAY)
    assert (found.page_start, found.page_end) == (TODAY - 9 * DAY, TODAY - 2 * DAY)
    assert found.next_page == f"page_{TODAY - 2 * DAY}"
    last = parse(start_time=TODAY - 9 * DAY + 5, page=found.next_page)
    assert (last.page_start, last.page_end, last.next_page) == (TODAY - 2 * DAY, TODAY + DAY, None)


def test_lists_are_given_with_and_without_brackets() -> None:
    given = [("group_by[]", "model"), ("group_by", "project_id"), ("group_by", "model"), ("models[]", "a,b")]
    found = parse(COMPLETIONS, *given, start_time=TODAY)
    assert (found.groups, found.models) == (("model", "project_id"), ("a,b",))


def test_minutes_are_not_kept() -> None:
    error = refused("bucket_width", start_time=TODAY, bucket_width="1m")
    assert error.kind is ErrorKind.UNSUPPORTED
    assert "minutes" in error.message
    refused("bucket_width", COSTS, start_time=TODAY, bucket_width="1h")
    refused("bucket_width", start_time=TODAY, bucket_width="2d")
    assert parse(start_time=TODAY, bucket_width="1h", limit=168).width_s == HOUR


@pytest.mark.parametrize(
    ("param", "given"),
    [
        ("start_time", {}),
        ("start_time", {"start_time": "yesterday"}),
        ("start_time", {"start_time": "-5"}),
        ("start_time", {"start_time": "٣"}),
        ("start_time", {"start_time": NOW + DAY}),
        ("start_time", {"start_time": NOW - 3 * 366 * DAY}),
        ("end_time", {"start_time": TODAY, "end_time": "9" * 13}),
        ("limit", {"start_time": TODAY, "limit": 32}),
        ("limit", {"start_time": TODAY, "limit": 0}),
        ("limit", {"start_time": TODAY, "bucket_width": "1h", "limit": 169}),
        ("page", {"start_time": TODAY, "page": "page_1"}),
        ("page", {"start_time": TODAY, "page": f"page_{TODAY + 1}"}),
        ("page", {"start_time": TODAY, "page": "x"}),
        ("group_by[0]", {"start_time": TODAY, "group_by": "service_tier"}),
        ("batch", {"start_time": TODAY, "batch": "yes"}),
        ("colour", {"start_time": TODAY, "colour": "red"}),
        ("models", {"start_time": TODAY, "models": ""}),
    ],
)
def test_what_is_wrong_is_named(param: str, given: dict[str, Any]) -> None:
    refused(param, **given)


def test_each_endpoint_has_its_own() -> None:
    refused("batch", EMBEDDINGS, start_time=TODAY, batch="true")
    refused("group_by[0]", EMBEDDINGS, start_time=TODAY, group_by="batch")
    refused("models", COSTS, start_time=TODAY, models="m")
    refused("start_time", COMPLETIONS, ("start_time", "1"), start_time=TODAY)
    costs = parse(COSTS, start_time=TODAY - 200 * DAY, limit=180, group_by="line_item", line_items="m")
    assert (costs.page_end - costs.page_start, costs.groups, costs.models) == (180 * DAY, ("line_item",), ("m",))
