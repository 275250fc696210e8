"""Which roll-up answers a question about usage, for which time."""

from typing import Any

import pytest

from helixflow.auth.ledger.usage_query import Grain, UsageQuery, decode_position, encode_position, parse_usage_query
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb

HOUR, DAY = 3600, 86_400
# 2026-11-23 04:00 UTC.
NOW = 1_795_406_400
TODAY = NOW - 4 * HOUR


def ask(start: int = 0, end: int = 0, **fields: Any) -> UsageQuery:
    return parse_usage_query(pb.QueryUsageRequest(**{"from": start, "to": end, **fields}), NOW)


def refused(param: str, start: int = 0, end: int = 0, **fields: Any) -> str:
    with pytest.raises(HelixError) as caught:
        ask(start, end, **fields)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.UNPROCESSABLE, param)
    return caught.value.message


def test_without_a_range_it_is_the_last_thirty_days() -> None:
    assert ask(group_by=["hour"]).parts() == [(Grain.HOUR, NOW - 30 * DAY, NOW + HOUR)]
    assert ask(group_by=["key"]).parts() == [(Grain.DAY, TODAY - 29 * DAY, TODAY + DAY)]
    assert ask(TODAY - 400 * DAY, group_by=["month"]).end == TODAY + DAY


@pytest.mark.parametrize(
    ("start", "end", "groups", "expected"),
    [
        (TODAY - DAY, TODAY, [], [(Grain.DAY, TODAY - DAY, TODAY)]),
        (TODAY - DAY, TODAY, ["hour"], [(Grain.HOUR, TODAY - DAY, TODAY)]),
        (TODAY + 1, TODAY + HOUR + 1, [], [(Grain.HOUR, TODAY, TODAY + 2 * HOUR)]),
        # Over midnight, and no whole day.
        (TODAY - HOUR, TODAY + HOUR, ["day"], [(Grain.HOUR, TODAY - HOUR, TODAY + HOUR)]),
        (TODAY - 31 * DAY, TODAY - 1, ["day"], [(Grain.DAY, TODAY - 31 * DAY, TODAY)]),
        (TODAY - DAY, TODAY + 1, [], [(Grain.DAY, TODAY - DAY, TODAY), (Grain.HOUR, TODAY, TODAY + HOUR)]),
        (
            TODAY - 400 * DAY - 1,
            TODAY + 1,
            ["key", "month"],
            [
                (Grain.HOUR, TODAY - 400 * DAY - HOUR, TODAY - 400 * DAY),
                (Grain.DAY, TODAY - 400 * DAY, TODAY),
                (Grain.HOUR, TODAY, TODAY + HOUR),
            ],
        ),
        (TODAY + 1, TODAY + 2, ["tag:team"], [(Grain.DAY, TODAY, TODAY + DAY)]),
        (TODAY - 1, TODAY + 2, ["tag:team"], [(Grain.DAY, TODAY - DAY, TODAY + DAY)]),
    ],
)
def test_days_answer_where_they_can_and_hours_for_the_rest(
    start: int, end: int, groups: list[str], expected: list[tuple[Grain, int, int]]
) -> None:
    query = ask(start, end, group_by=groups)
    assert query.parts() == expected
    assert (query.start, query.end) == (expected[0][1], expected[-1][2])


def test_months_begin_where_the_calendar_says() -> None:
    # From 2026-11-23 to 2027-02-01: the last one is not in it.
    query = ask(TODAY, 1_801_440_000, group_by=["month"])
    assert query.month_starts() == [1_793_491_200, 1_796_083_200, 1_798_761_600]


def test_what_cannot_be_grouped_by_is_named() -> None:
    assert "tag:<name>" in refused("group_by[0]", group_by=["colour"])
    refused("group_by[1]", group_by=["day", "Day"])
    refused("group_by[2]", group_by=["day", "key", "day"])
    assert "chat/completions" in refused("operation", operations=["embeddings", "chat"])
    refused("group_by[0]", group_by=["tag:"])
    refused("group_by[0]", group_by=["tag:" + "x" * 65])
    refused("group_by[1]", group_by=["tag:a", "tag:b"])
    refused("group_by", group_by=["key", "project", "user", "model", "deployment", "day", "month"])


def test_ranges_are_bounded() -> None:
    refused("from", TODAY, TODAY)
    refused("from", TODAY, TODAY - 1)
    refused("from", NOW + DAY)
    refused("from", -1, TODAY)
    refused("from", TODAY, 2**62)
    refused("from", TODAY - 2 * 366 * DAY - 1, TODAY)
    refused("from", TODAY - 31 * DAY - 1, TODAY, group_by=["hour"])
    assert ask(TODAY - 2 * 366 * DAY, TODAY).start == TODAY - 2 * 366 * DAY


def test_tags_are_summed_up_by_days_and_each_by_itself() -> None:
    query = ask(tag="team=a=b")
    assert (query.tag, query.tag_value) == ("team", "a=b")
    assert ask(tag="team=", group_by=["tag:team"]).tag_value == ""
    assert ask(group_by=["tag:team"]).tag_value is None
    refused("tag", tag="team")
    refused("tag", tag="=x")
    refused("tag", tag="job=x", group_by=["tag:team"])
    refused("group_by", tag="job=x", group_by=["hour"])


def test_a_cursor_is_of_one_list() -> None:
    cursor = encode_position((TODAY, "Ärger\U0001f600"))
    assert decode_position(cursor, ("day", "model")) == (TODAY, "Ärger\U0001f600")
    for groups in (("model", "day"), ("day",), ("day", "model", "key")):
        with pytest.raises(HelixError):
            decode_position(cursor, groups)
    for wrong in ("", "é", "x" * 9000, encode_position((-1, "m")), encode_position((2**62, "m"))):
        with pytest.raises(HelixError) as caught:
            decode_position(wrong, ("day", "model"))
        assert caught.value.param == "cursor"
