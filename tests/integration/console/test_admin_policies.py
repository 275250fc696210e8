"""Limits and budgets over REST: enums are words, money is text, and what is wrong is named."""

from typing import Any

import httpx2

from helixflow.rpc.generated.auth_v1 import metering_pb2, usage_pb2
from tests.harness.scripted_auth import ScriptedAuth

LIMIT = usage_pb2.Limit(
    id="limit_1",
    organisation_id="org_1",
    scope=metering_pb2.SCOPE_USER,
    subject_id="user_1",
    metric=metering_pb2.METRIC_TOKENS_PER_DAY,
    value=10**12,
    burst=10**13,
    imposed=True,
    created_at=1_763_837_100,
    updated_at=1_763_837_101,
    version=2,
)
BUDGET = usage_pb2.Budget(
    id="budget_1",
    organisation_id="org_1",
    scope=metering_pb2.SCOPE_ORGANISATION,
    subject_id="org_1",
    unit=metering_pb2.BUDGET_UNIT_MONEY,
    period=metering_pb2.BUDGET_PERIOD_MONTH,
    cap="9000000.00",
    spent="0.000000001",
    period_start=1_793_491_200,
    period_end=1_796_083_200,
    thresholds=[50, 100],
    created_at=1_763_837_100,
    updated_at=1_763_837_100,
    version=1,
)


async def test_a_limit_is_made_of_words(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["CreateLimit"] = LIMIT
    body = {"scope": "user", "subject_id": "user_1", "metric": "tokens_per_day", "value": 10**12, "imposed": True}
    answer = await api.post("/limits", json=body)
    assert (answer.status_code, answer.headers["location"]) == (201, "/api/v1/limits/limit_1")
    assert auth.last.request == usage_pb2.CreateLimitRequest(
        scope=metering_pb2.SCOPE_USER,
        subject_id="user_1",
        metric=metering_pb2.METRIC_TOKENS_PER_DAY,
        value=10**12,
        imposed=True,
    )
    assert answer.json() == {
        "id": "limit_1",
        "organisation_id": "org_1",
        "scope": "user",
        "subject_id": "user_1",
        "model": None,
        "metric": "tokens_per_day",
        "value": 10**12,
        "burst": 10**13,
        "imposed": True,
        "created_at": "2025-11-22T18:45:00Z",
        "updated_at": "2025-11-22T18:45:01Z",
        "version": 2,
    }


async def test_a_limit_is_changed_if_it_is_as_it_was(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["UpdateLimit"] = LIMIT
    answer = await api.patch("/limits/limit_1", json={"burst": 7}, headers={"if-match": '"2"'})
    assert (answer.status_code, answer.headers["etag"]) == (200, '"2"')
    assert auth.last.request == usage_pb2.UpdateLimitRequest(id="limit_1", if_version=2, burst=7)


async def test_a_budget_is_made_and_shown_with_exact_money(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["CreateBudget"] = BUDGET
    body = {"scope": "organisation", "unit": "money", "period": "month", "cap": "9000000.00", "thresholds": [50, 100]}
    answer = await api.post("/budgets", json=body)
    assert answer.status_code == 201
    assert auth.last.request == usage_pb2.CreateBudgetRequest(
        scope=metering_pb2.SCOPE_ORGANISATION,
        unit=metering_pb2.BUDGET_UNIT_MONEY,
        period=metering_pb2.BUDGET_PERIOD_MONTH,
        cap="9000000.00",
        thresholds=[50, 100],
    )
    shown = answer.json()
    assert (shown["cap"], shown["spent"], shown["unit"], shown["period"]) == (
        *("9000000.00", "0.000000001", "money", "month"),
    )
    assert (shown["period_start"], shown["period_end"]) == ("2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z")


async def test_a_total_begins_and_ends_never(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    total = usage_pb2.Budget()
    total.CopyFrom(BUDGET)
    total.period, total.period_start, total.period_end = metering_pb2.BUDGET_PERIOD_TOTAL, 0, 0
    auth.answers["GetBudget"] = total
    shown = (await api.get("/budgets/budget_1")).json()
    assert (shown["period"], shown["period_start"], shown["period_end"]) == ("total", None, None)


async def test_lists_are_filtered(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["ListLimits"] = usage_pb2.ListLimitsResponse(limits=[LIMIT], next_cursor="abc")
    page = (await api.get("/limits", params={"scope": "key", "subject_id": "key_1", "organisation_id": "org_2"})).json()
    assert ([limit["id"] for limit in page["data"]], page["next_cursor"]) == (["limit_1"], "abc")
    assert auth.last.request == usage_pb2.ListPoliciesRequest(
        page_size=20, scope=metering_pb2.SCOPE_KEY, subject_id="key_1", organisation_id="org_2"
    )
    auth.answers["ListBudgetEvents"] = usage_pb2.ListBudgetEventsResponse(
        events=[usage_pb2.BudgetEvent(id="e", budget_id="b", threshold=80, spent="8.00", cap="10.00", at=1)]
    )
    (event,) = (await api.get("/budget-events", params={"budget_id": "b"})).json()["data"]
    assert (event["threshold"], event["spent"], event["period_start"]) == (80, "8.00", None)
    await api.get("/budgets")
    assert auth.last.request == usage_pb2.ListPoliciesRequest(page_size=20)


NEW_LIMIT = {"scope": "organisation", "metric": "parallel_requests", "value": 1}
NEW_BUDGET = {"scope": "organisation", "unit": "money", "period": "day", "cap": "1"}


WRONG: list[tuple[str, str, dict[str, Any]]] = [
    *(("/limits", "value", {**NEW_LIMIT, "value": value}) for value in (0, -1, 10**12 + 1, 1.5, "1", None, 2**80)),
    *(("/limits", "burst", {**NEW_LIMIT, "burst": value}) for value in (0, -1, 10**13 + 1)),
    *(("/limits", "scope", {**NEW_LIMIT, "scope": value}) for value in ("", "Key", "planet", 1, None)),
    *(("/limits", "metric", {**NEW_LIMIT, "metric": value}) for value in ("unspecified", "days", 1)),
    ("/limits", "model", {**NEW_LIMIT, "model": "a b"}),
    ("/limits", "unknown", {**NEW_LIMIT, "unknown": 1}),
    *(("/budgets", "cap", {**NEW_BUDGET, "cap": cap}) for cap in ("-1", "1e3", "", "1.0000000001", "NaN", "١", 1)),
    *(("/budgets", "cap", {**NEW_BUDGET, "cap": cap}) for cap in (1.5, None, "9" * 30)),
    *(("/budgets", "scope", {**NEW_BUDGET, "scope": scope}) for scope in ("user", "installation")),
    ("/budgets", "period", {**NEW_BUDGET, "period": "week"}),
    ("/budgets", "thresholds.0", {**NEW_BUDGET, "thresholds": [0]}),
    ("/budgets", "thresholds", {**NEW_BUDGET, "thresholds": []}),
    ("/budgets", "thresholds", {**NEW_BUDGET, "thresholds": list(range(1, 12))}),
]


async def test_what_is_wrong_is_named_and_goes_no_further(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    for path, param, body in WRONG:
        answer = await api.post(path, json=body)
        assert answer.status_code == 422, body
        assert [error["param"] for error in answer.json()["errors"]] == [param], body
    assert auth.asked == []
