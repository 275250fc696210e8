"""OpenAI's endpoints for an organisation's usage and costs, as the official SDK asks and reads them."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from helixflow.console.app import create_app
from helixflow.console.server import AdminServer
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import usage_pb2
from tests.harness.scripted_auth import ScriptedAuth, scripted_auth

HOUR, DAY = 3600, 86_400
# 2026-11-23 04:00 UTC.
NOW = 1_795_406_400
TODAY = NOW - 4 * HOUR


@pytest.fixture
async def auth(tmp_path: Path) -> AsyncIterator[ScriptedAuth]:
    async with scripted_auth(tmp_path / "auth.sock") as running:
        yield running


@pytest.fixture
async def web(tmp_path: Path, auth: ScriptedAuth) -> AsyncIterator[httpx2.AsyncClient]:
    path = tmp_path / "admin.sock"
    server = AdminServer(create_app(auth.channel, clock=FakeClock(float(NOW))), path)
    await server.start()
    transport = httpx2.AsyncHTTPTransport(uds=str(path))
    async with httpx2.AsyncClient(transport=transport, base_url="http://admin") as client:
        yield client
    await server.close()


@pytest.fixture
async def usage(web: httpx2.AsyncClient) -> Any:
    client = openai.AsyncOpenAI(
        admin_api_key="hfk_test", api_key="", base_url="http://admin/v1", http_client=web, max_retries=0
    )
    return client.admin.organization.usage


def row(*group: Any, **figures: Any) -> usage_pb2.UsageRow:
    return usage_pb2.UsageRow(group=map(str, group), **{"cost": "0.00", **figures})


def answer(*rows: usage_pb2.UsageRow, cursor: str = "") -> usage_pb2.QueryUsageResponse:
    return usage_pb2.QueryUsageResponse(rows=rows, next_cursor=cursor)


async def test_completions_by_day_model_and_project(usage: Any, auth: ScriptedAuth) -> None:
    figures = {"requests": 4, "prompt_tokens": 100, "cached_tokens": 30, "completion_tokens": 50}
    first = answer(row(TODAY - DAY, "chat", "proj_1", **figures), cursor="next")
    auth.answers["QueryUsage"] = iter([first, answer(row(TODAY, "chat", "", requests=1))])
    page = await usage.completions(
        start_time=TODAY - DAY,
        group_by=["model", "project_id"],
        project_ids=["proj_1"],
        api_key_ids=["key_1"],
        user_ids=["user_1"],
        models=["chat", "embedder"],
    )
    asked, further = (call.request for call in auth.asked)
    assert list(asked.group_by) == ["day", "model", "project"]
    assert list(asked.operations) == ["chat/completions", "completions"]
    assert list(asked.models) == ["chat", "embedder"]
    assert (list(asked.key_ids), list(asked.user_ids), list(asked.project_ids)) == (["key_1"], ["user_1"], ["proj_1"])
    assert (getattr(asked, "from"), asked.to, further.cursor) == (TODAY - DAY, TODAY + DAY, "next")
    assert auth.last.metadata["authorization"] == "Bearer hfk_test"
    assert (page.object, page.has_more, page.next_page) == ("page", False, None)
    yesterday, today = page.data
    assert (yesterday.start_time, yesterday.end_time) == (TODAY - DAY, TODAY)
    (result,) = yesterday.results
    assert type(result).__name__ == "DataResultOrganizationUsageCompletionsResult"
    assert (result.input_tokens, result.output_tokens, result.num_model_requests) == (100, 50, 4)
    assert (result.input_cached_tokens, result.input_uncached_tokens) == (30, 70)
    assert (result.model, result.project_id, result.user_id, result.api_key_id) == ("chat", "proj_1", None, None)
    assert [found.project_id for found in today.results] == [None]


async def test_embeddings_are_asked_for_by_what_they_are(usage: Any, auth: ScriptedAuth) -> None:
    auth.answers["QueryUsage"] = answer(row(NOW, "key_1", requests=2, prompt_tokens=9))
    page = await usage.embeddings(start_time=NOW, bucket_width="1h", group_by=["api_key_id"])
    assert list(auth.last.request.operations) == ["embeddings"]
    assert (list(auth.last.request.group_by), list(auth.last.request.models)) == (["hour", "key"], [])
    ((result,),) = (bucket.results for bucket in page.data)
    assert type(result).__name__ == "DataResultOrganizationUsageEmbeddingsResult"
    assert (result.input_tokens, result.num_model_requests, result.api_key_id) == (9, 2, "key_1")


async def test_costs_are_exact_numbers(usage: Any, web: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["QueryUsage"] = answer(
        row(TODAY, "proj_1", "chat", cost="0.000000001"), row(TODAY, "", "x", cost="7.10")
    )
    page = await usage.costs(start_time=TODAY, group_by=["project_id", "line_item"])
    assert list(auth.last.request.group_by) == ["day", "project", "model"]
    first, second = page.data[0].results
    assert type(first).__name__ == "DataResultOrganizationCostsResult"
    assert (first.amount.value, first.amount.currency) == (1e-9, "usd")
    assert (first.project_id, first.line_item, second.project_id) == ("proj_1", "chat", None)
    plain = await web.get(f"/v1/organization/costs?start_time={TODAY}&group_by=project_id&group_by=line_item",
                          headers={"authorization": "Bearer hfk_test"})  # fmt: skip
    assert '"value":0.000000001,' in plain.text
    assert list(auth.last.request.operations) == [], "all of them cost"


async def test_pages_follow_each_other(usage: Any, auth: ScriptedAuth) -> None:
    auth.answers["QueryUsage"] = iter([answer(), answer()])
    start = TODAY - 2 * DAY
    first = await usage.completions(start_time=start, limit=2)
    assert [bucket.start_time for bucket in first.data] == [start, start + DAY]
    assert first.has_more
    second = await usage.completions(start_time=start, limit=2, page=first.next_page)
    assert [bucket.start_time for bucket in second.data] == [TODAY]
    assert (second.has_more, second.next_page) == (False, None)


async def test_nothing_runs_in_batches(usage: Any, auth: ScriptedAuth) -> None:
    auth.answers["QueryUsage"] = answer(row(TODAY, requests=1))
    assert [bucket.results for bucket in (await usage.completions(start_time=TODAY, batch=True)).data] == [[]]
    assert not auth.asked
    page = await usage.completions(start_time=TODAY, batch=False, group_by=["batch"])
    assert [found.batch for found in page.data[0].results] == [False]


async def test_errors_have_the_form_of_openais(usage: Any, web: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    with pytest.raises(openai.BadRequestError) as minutes:
        await usage.completions(start_time=TODAY, bucket_width="1m")
    assert minutes.value.param == "bucket_width"
    assert "minutes" in minutes.value.message
    auth.answers["QueryUsage"] = HelixError(ErrorKind.PERMISSION_DENIED, "Not permitted: this needs usage:read.")
    with pytest.raises(openai.PermissionDeniedError) as denied:
        await usage.costs(start_time=TODAY)
    assert denied.value.code == "permission_denied"
    auth.answers["QueryUsage"] = HelixError(ErrorKind.UNPROCESSABLE, "No.", param="project_id")
    with pytest.raises(openai.BadRequestError) as refused:
        await usage.costs(start_time=TODAY)
    assert (refused.value.param, refused.value.code) == ("project_ids", "invalid_value")
    for path, status in [
        (f"/v1/organization/costs?start_time={TODAY}", 401),
        ("/v1/organization/projects", 404),
    ]:
        found = await web.get(path)
        assert (found.status_code, found.headers["content-type"]) == (status, "application/json")
        assert found.json()["error"].keys() == {"message", "type", "param", "code"}
    posted = await web.post("/v1/organization/costs")
    assert (posted.status_code, posted.headers["allow"]) == (405, "GET, HEAD")
    assert "error" in posted.json()


async def test_too_many_results_are_refused(usage: Any, auth: ScriptedAuth) -> None:
    many = answer(*[row(TODAY, f"key_{number}") for number in range(1000)], cursor="more")
    auth.answers["QueryUsage"] = many
    with pytest.raises(openai.BadRequestError, match="fewer buckets or groups"):
        await usage.costs(start_time=TODAY, group_by=["api_key_id"])
    assert len(auth.asked) == 21
