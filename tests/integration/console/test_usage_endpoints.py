"""Usage and requests over the admin API: what is asked of auth, and what is made of its answers."""

import csv
import io
import json
from typing import Any

import httpx2
import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import usage_pb2
from tests.harness.scripted_auth import ScriptedAuth

# 2026-11-23 00:00 UTC.
TODAY = 1_795_392_000
FIGURES = {"requests": 3, "failed_requests": 1, "prompt_tokens": 2**53, "completion_tokens": 5, "cost": "0.0000015"}
SHOWN = {"cached_tokens": 0, "reasoning_tokens": 0, **FIGURES}


def usage(*groups: list[str], cursor: str = "") -> usage_pb2.QueryUsageResponse:
    rows = [usage_pb2.UsageRow(group=group, **FIGURES) for group in groups]
    answer = usage_pb2.QueryUsageResponse(rows=rows, next_cursor=cursor, total=usage_pb2.UsageRow(**FIGURES))
    setattr(answer, "from", TODAY)
    answer.to = TODAY + 86_400
    return answer


def details(**changes: Any) -> usage_pb2.RequestDetails:
    explanation = {
        "authorised_by": "key",
        "policies": ["lim_1", "bud_1"],
        "reserved_tokens": 100,
        "reserved_cost": 2_500_000,
        "attempts": [["m/llama_cpp-0", "upstream_unavailable"]],
        "journal_id": "a" * 24,
    }
    values: dict[str, Any] = {
        "call_id": "c" * 32,
        "request_id": "req_1",
        "organisation_id": "org_1",
        "project_id": "proj_1",
        "key_id": "key_1",
        "model": "m",
        "deployment": "m/llama_cpp-1",
        "dialect": "openai",
        "operation": "chat/completions",
        "status": 200,
        "outcome": "completed",
        "admitted_at_ms": TODAY * 1000 + 125,
        "queue_ms": -1,
        "first_token_ms": 20,
        "duration_ms": 30,
        "engine_ms": 10,
        "cost": "0.25",
        "price_version": "0123456789abcdef",
        "tags": {"team": "Ä"},
        "explanation": json.dumps(explanation),
    }
    return usage_pb2.RequestDetails(**{**values, **changes})


def refusals(answer: httpx2.Response) -> list[str]:
    assert answer.status_code == 422, answer.text
    return [error["param"] for error in answer.json()["errors"]]


async def test_a_question_reaches_auth_as_it_was_asked(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["QueryUsage"] = usage(["1795392000", "proj_1", "a,b"], cursor="more")
    answer = await api.get(
        "/usage?group_by=day,project&group_by=tag:a,b&from=2026-11-23T00:00:00Z&to=2026-11-24T00:00:00Z"
        "&project_id=proj_1&project_id=proj_2&key_id=key_1&user_id=user_1&model=m&operation=embeddings&operation=chat%2Fcompletions&tag=team%3Dx%3Dy&limit=7&cursor=abc"
    )
    expected = usage_pb2.QueryUsageRequest(
        to=TODAY + 86_400,
        group_by=["day", "project", "tag:a,b"],
        project_ids=["proj_1", "proj_2"],
        key_ids=["key_1"],
        user_ids=["user_1"],
        models=["m"],
        operations=["embeddings", "chat/completions"],
        tag="team=x=y",
        page_size=7,
        cursor="abc",
    )
    setattr(expected, "from", TODAY)
    assert auth.last.request == expected
    group = {"day": "2026-11-23T00:00:00Z", "project": "proj_1", "tag:a,b": "a,b"}
    assert answer.json() == {
        "from": "2026-11-23T00:00:00Z",
        "to": "2026-11-24T00:00:00Z",
        "data": [{**SHOWN, "group": group}],
        "total": SHOWN,
        "next_cursor": "more",
    }


async def test_a_table_has_all_pages_and_no_formulas(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    first = usage(["1795392000", "=cmd|' /C calc'!A0"], ["1795392000", "+1"], cursor="2")
    auth.answers["QueryUsage"] = iter([first, usage(["1795478400", "Ä\n;"])])
    answer = await api.get("/usage?group_by=day,tag:team&format=csv")
    assert answer.headers["content-type"].startswith("text/csv")
    assert "attachment" in answer.headers["content-disposition"]
    header, *rows = csv.reader(io.StringIO(answer.text, newline=""))
    figures = ["requests", "failed_requests", "prompt_tokens", "cached_tokens", "completion_tokens",
               "reasoning_tokens", "cost"]  # fmt: skip
    assert header == ["day", "tag:team", *figures]
    assert [row[:2] for row in rows] == [
        ["2026-11-23T00:00:00Z", "'=cmd|' /C calc'!A0"],
        ["2026-11-23T00:00:00Z", "'+1"],
        ["2026-11-24T00:00:00Z", "Ä\n;"],
    ]
    assert rows[0][2:] == ["3", "1", str(2**53), "0", "5", "0", "0.0000015"]
    assert [asked.request.page_size for asked in auth.asked] == [1000, 1000]
    assert [asked.request.cursor for asked in auth.asked] == ["", "2"]


async def test_a_refusal_comes_before_the_table(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["QueryUsage"] = HelixError(ErrorKind.UNPROCESSABLE, "No.", param="group_by[0]")
    assert refusals(await api.get("/usage?group_by=x&format=csv")) == ["group_by[0]"]
    assert refusals(await api.get("/usage?format=csv&cursor=abc")) == ["cursor"]
    head = await api.head("/usage")
    assert head.status_code == 422


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("from=yesterday", "from"),
        ("from=2026-11-23T00:00:00Z&from=2026-11-23T00:00:00Z", "from"),
        ("since=2026-11-23T00:00:00Z", "since"),
        ("format=xml", "format"),
        ("tag=team", "tag"),
        ("project_id=a%20b", "project_id.0"),
        ("group_by=%00", "group_by.0"),
        ("limit=101", "limit"),
        ("operation=chat", "operation.0"),
    ],
)
async def test_what_is_wrong_is_named(api: httpx2.AsyncClient, auth: ScriptedAuth, query: str, param: str) -> None:
    assert refusals(await api.get(f"/usage?{query}")) == [param]
    assert not auth.asked


async def test_requests_are_listed_and_shown(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["ListRequests"] = usage_pb2.ListRequestsResponse(requests=[details()], next_cursor="n")
    auth.answers["DescribeRequest"] = details()
    listed = await api.get("/requests?from=2026-11-23T00:00:00Z&outcome=failed&project_id=proj_1&key_id=key_1&model=m")
    request = auth.last.request
    assert (getattr(request, "from"), request.outcome, request.project_id) == (TODAY, "failed", "proj_1")
    assert (request.key_id, request.model, request.page_size) == ("key_1", "m", 20)
    shown = (await api.get("/requests/req_1")).json()
    assert listed.json() == {"data": [shown], "next_cursor": "n"}
    assert auth.last.request.id == "req_1"
    assert shown["admitted_at"] == "2026-11-23T00:00:00.125000Z"
    assert (shown["queue_ms"], shown["first_token_ms"], shown["user_id"], shown["error"]) == (None, 20, None, None)
    assert (shown["cost"], shown["tags"]) == ("0.25", {"team": "Ä"})
    assert "explanation" not in shown


async def test_a_request_is_explained(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["DescribeRequest"] = details()
    rates = usage_pb2.Rates(input="1.00", cached_input="0.50", output="2.00", request="0.00", engine_second="0.00")
    auth.answers["GetPrice"] = usage_pb2.PriceEntry(version="0123456789abcdef", source="set", rates=rates)
    told = (await api.get("/requests/req_1/explain")).json()
    assert [asked.method for asked in auth.asked] == ["DescribeRequest", "GetPrice"]
    assert auth.last.request.subject == "0123456789abcdef"
    assert auth.last.metadata["authorization"] == "Bearer hfk_test"
    assert told["authorised"] == {
        "organisation_id": "org_1", "project_id": "proj_1", "key_id": "key_1", "user_id": None, "by": "key",
    }  # fmt: skip
    assert told["limited"] == {"policies": ["lim_1", "bud_1"], "reserved_tokens": 100, "reserved_cost": "0.0025"}
    assert told["retried"] == [{"deployment": "m/llama_cpp-0", "error": "upstream_unavailable"}]
    assert (told["routed"]["deployment"], told["routed"]["journal_id"]) == ("m/llama_cpp-1", "a" * 24)
    assert (told["priced"]["cost"], told["priced"]["source"]) == ("0.25", "set")
    assert told["priced"]["rates"]["output"] == "2.00"
    assert told["priced"]["rates_withheld"] is None


async def test_who_may_not_read_prices_is_told_the_rest(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["DescribeRequest"] = details()
    auth.answers["GetPrice"] = HelixError(ErrorKind.PERMISSION_DENIED, "No.")
    priced = (await api.get("/requests/req_1/explain")).json()["priced"]
    assert (priced["rates"], priced["rates_withheld"], priced["cost"]) == (None, "permission_denied", "0.25")
    auth.answers["GetPrice"] = HelixError(ErrorKind.UNAVAILABLE, "Away.")
    assert (await api.get("/requests/req_1/explain")).status_code == 503
    auth.answers["DescribeRequest"] = HelixError(ErrorKind.NOT_FOUND, "No.", param="id")
    assert (await api.get("/requests/req_1/explain")).status_code == 404


async def test_what_was_never_rated_is_explained_without_a_price(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["DescribeRequest"] = details(price_version="", explanation="", cost="0.00", deployment="")
    told = (await api.get("/requests/req_1/explain")).json()
    assert [asked.method for asked in auth.asked] == ["DescribeRequest"]
    assert (told["priced"]["rates"], told["priced"]["rates_withheld"], told["retried"]) == (None, None, [])


async def test_a_table_that_breaks_off_is_cut_off(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["QueryUsage"] = iter([usage(["m"], cursor="2"), HelixError(ErrorKind.UNAVAILABLE, "Away.")])
    with pytest.raises(httpx2.RemoteProtocolError):
        await api.get("/usage?group_by=model&format=csv")
