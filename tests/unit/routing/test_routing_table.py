"""Names, splits and fallbacks: what a request for a model leads to."""

from collections import Counter

import pytest

from helixflow.core.call import Hints, Plan
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.settings.models import Split
from tests.harness.routing import make_call, make_routing, make_table, model, provider


async def test_an_alias_leads_to_its_model_and_counts_as_it() -> None:
    routing = make_routing(model("llama-3", provider("d"), aliases=("gpt-4", "gpt-4o")))
    router = routing.router
    assert list(router.routes) == ["llama-3", "gpt-4", "gpt-4o"]
    assert router.route("gpt-4").model == "llama-3"
    assert await routing.served_by(make_call("gpt-4")) == "llama-3/d"
    assert router.route("gpt-4", among={"llama-3"}) is router.route("llama-3")
    assert router.route("gpt-4", among={"gpt-4"}).model == "llama-3", "a key may be for one name only"
    with pytest.raises(HelixError):
        router.route("gpt-4o", among={"gpt-4"})


def canary(share: float = 10) -> list[object]:
    return [Split(model="old", weight=100 - share), Split(model="new", weight=share)]


async def test_a_split_keeps_its_users_and_its_weights() -> None:
    routing = make_routing(model("old", provider("d")), model("new", provider("d")), model("gpt-4", split=canary()))
    calls = [make_call("gpt-4", hints=Hints(user=f"user-{n}")) for n in range(4000)]
    first = [await routing.served_by(call) for call in calls]
    assert first == [await routing.served_by(call) for call in calls]
    assert 0.08 < Counter(first)["new/d"] / len(calls) < 0.12


async def test_when_a_canary_grows_nobody_goes_back() -> None:
    models = model("old", provider("d")), model("new", provider("d"))
    small = make_routing(*models, model("gpt-4", split=canary(10)))
    large = make_routing(*models, model("gpt-4", split=canary(30)))
    calls = [make_call("gpt-4", hints=Hints(user=f"user-{n}")) for n in range(1000)]
    before = {n for n, call in enumerate(calls) if await small.served_by(call) == "new/d"}
    after = {n for n, call in enumerate(calls) if await large.served_by(call) == "new/d"}
    assert before < after


async def test_without_a_user_a_session_goes_one_way_and_other_requests_are_shared_out() -> None:
    routing = make_routing(model("old", provider("d")), model("new", provider("d")), model("m", split=canary(50)))

    async def ways(hints: Hints) -> Counter[str]:
        return Counter([await routing.served_by(make_call(call_id=f"{n:032}", hints=hints)) for n in range(200)])

    assert len(await ways(Hints(session="s"))) == 1
    assert 60 < (await ways(Hints()))["new/d"] < 140


async def test_the_ways_of_a_split_keep_its_conditions() -> None:
    eu, us = model("old", provider("d", region="eu")), model("new", provider("d", region="us"))
    routing = make_routing(eu, us, model("m", split=canary(99), residency="eu", fallbacks=("old",)))
    served = {await routing.served_by(make_call(call_id=f"{n:032}")) for n in range(50)}
    assert served == {"old/d"}


@pytest.mark.parametrize("who", ["way", "principal", "hints"])
async def test_ways_that_may_not_serve_a_request_are_not_drawn_and_their_users_stay_together(who: str) -> None:
    eu, us = model("old", provider("d", region="eu")), model("new", provider("d", region="us"))
    other = model("other", provider("d"), provider("e", region="eu"))
    if who == "way":
        other = model("other", provider("d"), residency="eu")
    routing = make_routing(
        eu, us, other, model("m", split=[Split(model=name, weight=1) for name in ("old", "new", "other")])
    )
    hints = [Hints(user=f"user-{n}", residency="eu" if who == "hints" else "") for n in range(60)]
    calls = [make_call("m", hints=one, residency="eu" if who == "principal" else "") for one in hints]
    served = [await routing.served_by(call) for call in calls]
    assert set(served) == ({"old/d", "new/d"} if who == "way" else {"old/d", "other/e"})
    assert served == [await routing.served_by(call) for call in calls]
    free = [await routing.served_by(make_call("m", hints=Hints(user=f"user-{n}"))) for n in range(60)]
    assert all(now == before for now, before in zip(served, free, strict=True) if before == "old/d"), (
        "who may stay does"
    )


async def test_where_no_way_may_serve_a_request_that_is_said() -> None:
    routing = make_routing(
        model("old", provider("d", region="us")), model("new", provider("d")), model("m", split=canary())
    )
    with pytest.raises(HelixError) as caught:
        await routing.router.open(make_call("m", residency="eu"))
    assert caught.value.kind is ErrorKind.PERMISSION_DENIED


async def test_a_way_goes_by_its_own_settings() -> None:
    routing = make_routing(
        model("old", provider("dear"), provider("cheap"), balance="cost"),
        model("m", split=[Split(model="old", weight=1)]),
        cost_bound=lambda deployment, call: 2 if deployment == "old/dear" else 1,
    )
    assert {await routing.served_by(make_call("m")) for _ in range(9)} == {"old/cheap"}


async def test_what_holds_for_a_split_holds_for_it_as_a_fallback() -> None:
    routing = make_routing(
        model("a", provider("d"), fallbacks=("m",)),
        model("old", provider("d", region="us"), provider("e", region="eu"), max_cost="2"),
        model("m", split=[Split(model="old", weight=1)], residency="eu", max_cost="1"),
        cost_bound=lambda deployment, call: 10**9,
    )
    routing.engines["a/d"].fail(ErrorKind.UPSTREAM_UNAVAILABLE)
    assert await routing.served_by(make_call("a")) == "old/e"
    route = routing.router.route("a").fallbacks[0].ways["old"]
    assert (route.regions, route.max_cost) == ({"eu"}, 10**9)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ErrorKind.UPSTREAM_UNAVAILABLE, "error"),
        (ErrorKind.OVERLOADED, "error"),
        (ErrorKind.DEADLINE, "error"),
        (ErrorKind.CONTEXT_LENGTH_EXCEEDED, "context_length"),
        (ErrorKind.CONTENT_FILTERED, "content_filter"),
    ],
)
async def test_fallbacks_are_tried_for_the_reasons_that_they_are_for(kind: ErrorKind, reason: str) -> None:
    for reasons, served in (((reason,), "b/d"), (("error", "context_length", "content_filter"), "b/d"), ((), "")):
        routing = make_routing(
            model("a", provider("d"), fallbacks=("b",), fallback_on=reasons), model("b", provider("d", context=200_000))
        )
        routing.engines["a/d"].fail(kind)
        call = make_call("a")
        if served:
            assert await routing.served_by(call) == served
            assert call.progress.attempts == (("a/d", kind.value),)
            assert call.model == "a"
        else:
            with pytest.raises(HelixError) as caught:
                await routing.router.open(call)
            assert caught.value.kind is kind


async def test_a_mistake_of_the_client_is_not_repeated_at_a_fallback() -> None:
    routing = make_routing(
        model("a", provider("d"), fallbacks=("b",), fallback_on=("error", "context_length", "content_filter")),
        model("b", provider("d")),
    )
    routing.engines["a/d"].fail(ErrorKind.INVALID_REQUEST)
    with pytest.raises(HelixError):
        await routing.router.open(make_call("a"))
    assert routing.counts()["b/d"] == 0


async def test_fallbacks_are_tried_in_order_and_their_own_are_not() -> None:
    routing = make_routing(
        model("a", provider("d"), fallbacks=("b", "c")),
        model("b", provider("d"), fallbacks=("d",)),
        model("c", provider("d")),
        model("d", provider("d")),
    )
    for name in ("a/d", "b/d"):
        routing.engines[name].fail(ErrorKind.UPSTREAM_UNAVAILABLE)
    assert await routing.served_by(make_call("a")) == "c/d"
    routing.engines["c/d"].fail(ErrorKind.UPSTREAM_INVALID)
    with pytest.raises(HelixError) as caught:
        await routing.router.open(make_call("a"))
    assert caught.value.kind is ErrorKind.UPSTREAM_INVALID
    assert routing.counts()["d/d"] == 0


async def test_fallbacks_stay_in_the_models_region() -> None:
    routing = make_routing(
        model("a", provider("d", region="eu"), residency="eu", fallbacks=("b", "c")),
        model("b", provider("d")),
        model("c", provider("d", region="eu")),
    )
    routing.engines["a/d"].fail(ErrorKind.UPSTREAM_UNAVAILABLE)
    assert await routing.served_by(make_call("a")) == "c/d"
    assert routing.counts()["b/d"] == 0


async def test_a_model_that_may_not_serve_a_request_leads_to_its_fallbacks() -> None:
    routing = make_routing(model("a", provider("d"), fallbacks=("b",)), model("b", provider("d", region="eu")))
    assert await routing.served_by(make_call("a", residency="eu")) == "b/d"
    with pytest.raises(HelixError) as caught:
        await routing.router.open(make_call("a", residency="ch"))
    assert caught.value.kind is ErrorKind.PERMISSION_DENIED
    assert "'a'" in caught.value.message


def test_a_plan_names_all_that_may_be_billed() -> None:
    routes = make_table(
        model("a", provider("x", context=100), provider("y", context=300), fallbacks=("m", "b")),
        model("b", provider("x", context=200)),
        model("c", provider("x"), provider("y", weight=0), hedge_after_s=1, aliases=("alias",)),
        model("m", split=(Split(model="b", weight=1), Split(model="alias", weight=1))),
        model("alone", provider("x"), hedge_after_s=1),
    ).routes
    assert routes["b"].plan == Plan(("b/x",), 200, 1)
    assert routes["c"].plan == Plan(("c/x", "c/y"), 131_072, 2)
    assert routes["m"].plan == Plan(("b/x", "c/x", "c/y"), 131_072, 2)
    assert routes["a"].plan == Plan(("a/x", "a/y", "b/x", "c/x", "c/y"), 131_072, 2)
    assert routes["alone"].plan.attempts == 1, "there is nothing to hedge with"
    assert routes["alias"] is routes["c"]
