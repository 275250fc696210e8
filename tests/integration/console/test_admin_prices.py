"""What the admin API makes of requests about prices, and of the answers."""

import json
from typing import Any

import httpx2
import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from tests.harness.scripted_auth import ScriptedAuth

RATES = pb.Rates(
    input="2.50",
    cached_input="0.25",
    output="10.00",
    request="0.00",
    engine_second="0.0002",
    tiers=[pb.RateTier(from_prompt_tokens=200_000, input="5.00", cached_input="0.50", output="15.00")],
)
SHOWN_RATES = {
    "input": "2.50",
    "cached_input": "0.25",
    "output": "10.00",
    "request": "0.00",
    "engine_second": "0.0002",
    "tiers": [{"from_prompt_tokens": 200_000, "input": "5.00", "cached_input": "0.50", "output": "15.00"}],
}
ENTRY = pb.PriceEntry(
    version="9f86d081884c7d65",
    subject_kind="model",
    subject="gpt-4o",
    rates=RATES,
    valid_from=1_763_837_100,
    source="set",
    created_at=1_763_837_000,
    id="price_1",
)
SHOWN = {
    "id": "price_1",
    "price_version": "9f86d081884c7d65",
    "subject_kind": "model",
    "subject": "gpt-4o",
    "rates": SHOWN_RATES,
    "valid_from": "2025-11-22T18:45:00Z",
    "valid_to": None,
    "source": "set",
    "created_at": "2025-11-22T18:43:20Z",
}


async def test_a_price_is_set_as_it_was_given_and_shown_as_it_is(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["SetPrice"] = ENTRY
    body = {
        "subject_kind": "model",
        "subject": "gpt-4o",
        "rates": {**SHOWN_RATES, "request": None},
        "valid_from": "2027-01-01T00:00:00Z",
        "valid_to": "2027-02-01T00:00:00Z",
    }
    answer = await api.post("/prices", json=body, headers={"idempotency-key": "k1"})
    assert (answer.status_code, answer.json()) == (201, SHOWN)
    assert answer.headers["location"] == "/api/v1/prices/current?subject=9f86d081884c7d65"
    # What a version is made of says nothing about when it holds: it is no ETag.
    assert "etag" not in answer.headers
    wanted = pb.SetPriceRequest(
        subject_kind="model", subject="gpt-4o", rates=RATES, valid_from=1_798_761_600, valid_to=1_801_440_000
    )
    wanted.rates.ClearField("request")
    assert auth.last.request == wanted
    assert auth.last.metadata["idempotency-key"] == "k1"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"rates": {"input": "-1"}}, "rates.input"),
        ({"rates": {"input": 1}}, "rates.input"),
        ({"rates": {"output": "1e3"}}, "rates.output"),
        ({"rates": {"outputs": "1"}}, "rates.outputs"),
        ({"rates": {"tiers": [{"from_prompt_tokens": 0}]}}, "rates.tiers.0.from_prompt_tokens"),
        ({"rates": {"tiers": [{"from_prompt_tokens": 5, "input": "x"}]}}, "rates.tiers.0.input"),
        ({"subject_kind": "user"}, "subject_kind"),
        ({"subject": "a b"}, "subject"),
        ({"valid_from": "tomorrow"}, "valid_from"),
    ],
)
async def test_what_is_wrong_is_named(
    api: httpx2.AsyncClient, auth: ScriptedAuth, changes: dict[str, Any], param: str
) -> None:
    body = {"subject_kind": "model", "subject": "gpt-4o", "rates": {"input": "1"}, **changes}
    answer = await api.post("/prices", json=body)
    assert answer.status_code == 422
    assert [error["param"] for error in answer.json()["errors"]] == [param]
    assert auth.asked == []


async def test_what_the_service_refuses_is_named_too(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["SetPrice"] = HelixError(ErrorKind.UNPROCESSABLE, "Another price begins then.", param="valid_to")
    body = {"subject_kind": "model", "subject": "gpt-4o", "rates": {}}
    answer = await api.post("/prices", json=body)
    assert (answer.status_code, answer.json()["errors"][0]["param"]) == (422, "valid_to")


async def test_prices_are_listed_and_looked_up_at_a_moment(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    unset = pb.PriceEntry(version="0" * 16, subject_kind="deployment", subject="m/llama_cpp-0", source="default")
    auth.answers["ListPrices"] = pb.ListPricesResponse(prices=[unset, ENTRY], next_cursor="unset-1")
    listed = (await api.get("/prices", params={"subject": "gpt-4o", "limit": 2})).json()
    assert [price["valid_from"] for price in listed["data"]] == [None, SHOWN["valid_from"]]
    assert listed["data"][0]["id"] is None
    assert listed["data"][1] == SHOWN and listed["next_cursor"] == "unset-1"
    assert auth.last.request == pb.ListPricesRequest(subject="gpt-4o", page_size=2)
    await api.get("/prices", params={"cursor": "unset-1"})
    assert auth.last.request == pb.ListPricesRequest(page_size=20, cursor="unset-1")
    auth.answers["GetPrice"] = ENTRY
    found = await api.get("/prices/current", params={"subject": "gpt-4o/openai-0", "at": "2027-01-01T00:00:00Z"})
    assert (found.status_code, found.json()) == (200, SHOWN)
    assert auth.last.request == pb.GetPriceRequest(subject="gpt-4o/openai-0", at=1_798_761_600)
    missing = await api.get("/prices/current")
    assert (missing.status_code, missing.json()["errors"][0]["param"]) == (422, "subject")


async def test_a_price_is_ended_at_a_moment_or_now(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["EndPrice"] = ENTRY
    ended = await api.delete("/prices/price_1", params={"at": "2027-01-01T00:00:00Z"})
    assert (ended.status_code, ended.json()) == (200, SHOWN)
    assert auth.last.request == pb.EndPriceRequest(id="price_1", at=1_798_761_600)
    await api.delete("/prices/price_1")
    assert auth.last.request == pb.EndPriceRequest(id="price_1")
    auth.answers["EndPrice"] = HelixError(ErrorKind.CONFLICT, "This price has ended already.")
    assert (await api.delete("/prices/price_1")).status_code == 409


async def test_the_check_of_the_rating_comes_line_by_line(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    difference = pb.RatingDifference(call_id="c1", recorded="0.01", price_version="f" * 16)
    auth.answers["CheckRating"] = [
        pb.CheckRatingResponse(rows=5_000, recorded="1.00", rated="1.00"),
        pb.CheckRatingResponse(
            rows=5_001, differing=1, recorded="1.01", rated="1.00", differences=[difference], done=True
        ),
    ]
    answer = await api.get("/prices/check", params={"from": "2027-01-01T00:00:00Z", "current": "true"})
    assert answer.headers["content-type"] == "application/x-ndjson"
    first, last = map(json.loads, answer.text.splitlines())
    assert (first["rows"], first["done"], first["differences"]) == (5_000, False, [])
    assert last == {
        "rows": 5_001,
        "differing": 1,
        "recorded": "1.01",
        "rated": "1.00",
        "differences": [{"call_id": "c1", "recorded": "0.01", "rated": None, "price_version": "f" * 16}],
        "done": True,
    }
    assert getattr(auth.last.request, "from") == 1_798_761_600 and auth.last.request.current
    auth.answers["CheckRating"] = HelixError(ErrorKind.UNPROCESSABLE, "No range.", param="to")
    assert (await api.get("/prices/check")).status_code == 422
