"""Which deployments are tried, in which order, and what is told when none answers."""

import asyncio
import time

import pytest

from helixflow.core.call import Call, Hints, SideUsage, Stream, Usage
from helixflow.core.errors import ERRORS, ErrorKind, HelixError
from helixflow.settings.serving import RoutingSettings
from tests.harness.routing import Answer, Routing, make_call, make_routing, model, provider

FAILURES = RoutingSettings().ejection_failures


def in_turn(count: int = 2, **settings: object) -> Routing:
    """A model with so many deployments, one a tier."""
    return make_routing(model("m", *(provider(f"d{n}", tier=n) for n in range(count)), **settings))


class Stalled:
    """Has content once that is set."""

    def __init__(self) -> None:
        self.content = asyncio.Event()

    async def open(self, call: Call) -> Stream:
        call.progress.engine_began_at = 0.0
        await self.content.wait()
        return Answer("stalled")


async def refused(routing: Routing, call: Call | None = None) -> HelixError:
    with pytest.raises(HelixError) as caught:
        await routing.router.open(call or make_call())
    return caught.value


def test_every_kind_of_error_has_traits_and_a_code_of_its_own() -> None:
    assert set(ERRORS) == set(ErrorKind)
    assert len({kind.value for kind in ErrorKind}) == len(ErrorKind)
    for kind, traits in ERRORS.items():
        assert 400 <= traits.http < 600
        # OpenAI's clients take 422 for a fault of their own making: only the admin API says it.
        assert (traits.http == 422) is (kind is ErrorKind.UNPROCESSABLE)


@pytest.mark.parametrize(
    "kind",
    [ErrorKind.UPSTREAM_UNAVAILABLE, ErrorKind.UPSTREAM_INVALID, ErrorKind.OVERLOADED, ErrorKind.LOADING,
     ErrorKind.NOT_SERVED, ErrorKind.RATE_LIMITED, ErrorKind.DEADLINE],
)  # fmt: skip
async def test_the_next_deployment_is_tried(kind: ErrorKind) -> None:
    routing = in_turn()
    routing.engines["m/d0"].fail(kind)
    call = make_call()
    assert await routing.served_by(call) == "m/d1"
    assert routing.counts() == {"m/d0": 1, "m/d1": 1}
    assert call.progress.attempts == (("m/d0", kind.value),)


@pytest.mark.parametrize("kind", [ErrorKind.INVALID_REQUEST, ErrorKind.CONTENT_FILTERED, ErrorKind.DEADLINE])
async def test_what_another_deployment_cannot_better_is_raised(kind: ErrorKind) -> None:
    routing = in_turn()
    routing.engines["m/d0"].fail(kind)
    assert (await refused(routing, make_call(deadline=0.0))).kind is kind
    assert routing.counts() == {"m/d0": 1, "m/d1": 0}


async def test_a_prompt_that_is_too_long_is_tried_only_where_more_fits() -> None:
    routing = make_routing(
        model("m", *(provider(f"d{n}", tier=n, context=context) for n, context in enumerate((100, 100, 200))))
    )
    routing.engines["m/d0"].fail(ErrorKind.CONTEXT_LENGTH_EXCEEDED)
    assert await routing.served_by() == "m/d2"
    assert routing.counts()["m/d1"] == 0
    routing.engines["m/d2"].fail(ErrorKind.CONTEXT_LENGTH_EXCEEDED)
    assert (await refused(routing)).kind is ErrorKind.CONTEXT_LENGTH_EXCEEDED


async def test_a_prompt_that_cannot_fit_is_not_tried_there_unless_it_fits_nowhere() -> None:
    routing = make_routing(model("m", provider("small", context=100), provider("large", tier=1, context=10_000)))
    assert await routing.served_by(make_call(prompt="word " * 400)) == "m/large"
    assert await routing.served_by(make_call(prompt="word " * 40_000)) == "m/small", "it says best what is wrong"
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    call = make_call(messages=[{"role": "user", "content": [picture]}])
    assert await routing.served_by(call) == "m/small", "a picture's bytes are no tokens"


async def test_the_last_failure_is_the_callers() -> None:
    routing = in_turn()
    routing.engines["m/d0"].fail(ErrorKind.LOADING)
    routing.engines["m/d1"].fail(ErrorKind.UPSTREAM_INVALID)
    assert (await refused(routing)).kind is ErrorKind.UPSTREAM_INVALID


async def test_a_deployment_that_keeps_failing_is_left_alone_until_its_pause_is_over() -> None:
    routing = in_turn()
    first = routing.engines["m/d0"]
    first.fail(ErrorKind.UPSTREAM_UNAVAILABLE)
    for _ in range(FAILURES + 3):
        await routing.served_by()
    assert first.calls == FAILURES
    first.error = None
    routing.clock.advance(2.0)
    assert [await routing.served_by(), await routing.served_by()] == ["m/d0", "m/d0"]


async def test_when_all_keep_failing_they_are_tried_nevertheless() -> None:
    routing = in_turn()
    for engine in routing.engines.values():
        engine.fail(ErrorKind.UPSTREAM_UNAVAILABLE)
    for _ in range(FAILURES + 1):
        await refused(routing)
    routing.engines["m/d1"].error = None
    assert await routing.served_by() == "m/d1"


async def test_streams_that_break_off_count_against_their_deployment() -> None:
    routing = in_turn()
    for _ in range(FAILURES):
        call = make_call()
        stream = await routing.router.open(call)
        call.progress.failure = ErrorKind.UPSTREAM_INVALID
        stream.close()
        stream.close()
    assert await routing.served_by() == "m/d1"


async def test_clients_that_leave_do_not_count_against_a_deployment() -> None:
    routing = in_turn()
    for _ in range(FAILURES + 1):
        await routing.served_by()
    assert routing.counts()["m/d1"] == 0


async def test_retries_end_where_their_budget_does() -> None:
    routing = make_routing(
        model("m", provider("d0"), provider("d1", tier=1)),
        routing=RoutingSettings(retry_percent=0, retry_reserve=2, ejection_failures=100),
    )
    routing.engines["m/d0"].fail(ErrorKind.OVERLOADED)
    assert [await routing.served_by() for _ in range(2)] == ["m/d1"] * 2
    call = make_call()
    assert (await refused(routing, call)).kind is ErrorKind.OVERLOADED
    assert routing.counts()["m/d1"] == 2
    assert call.progress.attempts == (), "the last one is told as the call's own"


@pytest.mark.parametrize("kind", [ErrorKind.RATE_LIMITED, ErrorKind.OVERLOADED])
async def test_a_deployment_that_wants_a_rest_gets_it(kind: ErrorKind) -> None:
    routing = in_turn()
    first, second = routing.engines.values()
    first.fail(kind, retry_after_s=30)
    second.fail(kind, retry_after_s=20)
    assert (await refused(routing)).retry_after_s == 20
    first.error = second.error = None
    error = await refused(routing)
    assert (error.kind, error.retry_after_s) == (kind, 20)
    assert (first.calls, second.calls) == (1, 1)
    routing.clock.advance(20)
    assert await routing.served_by() == "m/d1"
    routing.clock.advance(10)
    assert await routing.served_by() == "m/d0"


async def test_a_full_deployment_is_passed_over_and_when_all_are_full_that_is_said() -> None:
    routing = make_routing(
        model("m", provider("d0", max_concurrency=1), provider("d1", tier=1, max_concurrency=1)),
    )
    stream = await routing.router.open(make_call())
    other = await routing.router.open(make_call())
    assert routing.counts() == {"m/d0": 1, "m/d1": 1}
    error = await refused(routing)
    assert error.kind is ErrorKind.RATE_LIMITED
    assert error.retry_after_s
    assert routing.counts() == {"m/d0": 1, "m/d1": 1}
    stream.close()
    assert await routing.served_by() == "m/d0"
    other.close()


async def test_whatever_happens_a_target_is_left() -> None:
    routing = in_turn(1, hedge_after_s=None)
    target, engine = routing.targets["m/d0"], routing.engines["m/d0"]
    stream = await routing.router.open(make_call())
    assert target.in_flight == 1
    stream.close()
    assert target.in_flight == 0
    await routing.router.open(make_call(stream=False))
    engine.fail(ErrorKind.INVALID_REQUEST)
    await refused(routing)

    def leave(call: Call) -> None:
        raise asyncio.CancelledError

    engine.before = leave
    with pytest.raises(asyncio.CancelledError):
        await routing.router.open(make_call())
    assert target.in_flight == 0


async def test_what_a_failed_attempt_made_is_not_paid() -> None:
    routing = in_turn()

    def half(call: Call) -> None:
        call.progress.usage.completion_tokens = 90
        call.progress.usage.reported = True
        call.progress.first_content_at = 1.0

    routing.engines["m/d0"].before = half
    routing.engines["m/d0"].fail(ErrorKind.UPSTREAM_UNAVAILABLE)
    call = make_call()
    await routing.router.open(call)
    assert (call.progress.usage, call.progress.first_content_at) == (Usage(), None)
    assert call.progress.attempts == (("m/d0", "upstream_unavailable"),)
    assert call.progress.deployment == "m/d1"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("since_first_s", "latency", "whole"), [(2.0, 1.0, 0.0), (None, 0.0, 3.0)])
async def test_it_is_measured_when_an_answer_begins_and_else_when_it_is_whole(
    stream: bool, since_first_s: float | None, latency: float, whole: float
) -> None:
    routing = in_turn(1)

    def answer(call: Call) -> None:
        routing.clock.advance(3.0)
        if since_first_s is not None:
            call.progress.first_content_at = time.perf_counter() - since_first_s

    routing.engines["m/d0"].before = answer
    (await routing.router.open(make_call(stream=stream))).close()
    target, now = routing.targets["m/d0"], routing.clock.monotonic()
    assert target.latency_s(now) == pytest.approx(3.0 if stream else latency, abs=0.5)
    assert target.whole_latency_s(now) == (0.0 if stream else whole)


@pytest.mark.parametrize("who", ["model", "principal", "hints"])
async def test_residency_leaves_only_deployments_that_are_known_to_be_there(who: str) -> None:
    deployments = provider("nowhere"), provider("us", region="us"), provider("eu", tier=9, weight=0, region="eu")
    routing = make_routing(model("m", *deployments, residency="eu" if who == "model" else None))
    call = make_call(
        residency="eu" if who == "principal" else "", hints=Hints(residency="eu") if who == "hints" else Hints()
    )
    assert await routing.served_by(call) == "m/eu"
    routing.engines["m/eu"].fail(ErrorKind.UPSTREAM_UNAVAILABLE)
    assert (await refused(routing, call)).kind is ErrorKind.UPSTREAM_UNAVAILABLE
    assert routing.counts() == {"m/nowhere": 0, "m/us": 0, "m/eu": 2}


async def test_a_region_that_nobody_serves_is_a_clear_refusal() -> None:
    routing = make_routing(model("m", provider("us", region="us"), provider("eu", region="eu")))
    error = await refused(routing, make_call(hints=Hints(residency="ch")))
    assert error.kind is ErrorKind.PERMISSION_DENIED
    assert "'ch'" in error.message
    error = await refused(routing, make_call(residency="eu", hints=Hints(residency="us")))
    assert error.kind is ErrorKind.PERMISSION_DENIED, "both hold"
    assert routing.counts() == {"m/us": 0, "m/eu": 0}


async def test_too_dear_deployments_do_not_serve() -> None:
    bounds = {"m/dear": 2_000_000, "m/cheap": 1_000_000}
    routing = make_routing(
        model("m", provider("dear"), provider("cheap", tier=1), max_cost="0.0015"),
        cost_bound=lambda deployment, call: bounds[deployment],
    )
    assert await routing.served_by() == "m/cheap"
    bounds["m/cheap"] = 1_500_001
    error = await refused(routing)
    assert (error.kind, error.param) == (ErrorKind.INVALID_REQUEST, "max_tokens")


@pytest.mark.parametrize(("most", "served"), [("0.003", "m/second"), ("0.0025", "m/cheap"), ("0.002", "")])
async def test_a_hedge_is_made_only_where_both_together_are_not_too_dear(most: str, served: str) -> None:
    bounds = {"m/first": 1_500_000, "m/second": 1_500_000, "m/cheap": 1_000_000}
    routing = make_routing(
        model(
            "m", *(provider(name, tier=tier) for tier, name in enumerate(("first", "second", "cheap"))),
            hedge_after_s=0.001, max_cost=most,
        ),
        cost_bound=lambda deployment, call: bounds[deployment],
    )  # fmt: skip
    stalled = Stalled()
    routing.targets["m/first"].engine = stalled
    call = make_call()
    opening = asyncio.create_task(routing.router.open(call))
    if served:
        await opening
        assert call.progress.deployment == served
        assert call.progress.attempts == (("m/first", "hedged"),)
        return
    await asyncio.sleep(0.05)
    assert routing.counts() == {"m/first": 0, "m/second": 0, "m/cheap": 0}
    stalled.content.set()
    await opening
    assert (call.progress.deployment, call.progress.attempts) == ("m/first", ())


async def test_what_a_loser_charges_counts_for_what_is_tried_after_it() -> None:
    routing = make_routing(model("m", provider("d"), max_cost="0.003"), cost_bound=lambda deployment, call: 2_000_000)
    call = make_call()
    assert await routing.served_by(call) == "m/d"
    call.progress.side_usage = (SideUsage("m/d", Usage(), 0),)
    assert (await refused(routing, call)).param == "max_tokens"


async def test_by_cost_the_cheapest_is_taken_that_is_healthy_and_free() -> None:
    bounds = {"m/dear": 3, "m/cheap": 1, "m/middling": 2}
    routing = make_routing(
        model("m", provider("dear"), provider("cheap", max_concurrency=2), provider("middling"), balance="cost"),
        cost_bound=lambda deployment, call: bounds[deployment],
    )
    taken = [await routing.served_by(close=False) for _ in range(3)]
    assert taken == ["m/cheap", "m/cheap", "m/middling"]
    routing.engines["m/middling"].fail(ErrorKind.UPSTREAM_UNAVAILABLE)
    assert await routing.served_by() == "m/dear"


async def test_without_weight_a_deployment_serves_only_when_no_other_does() -> None:
    routing = make_routing(model("m", provider("spare", weight=0), provider("d1", tier=5)))
    assert await routing.served_by() == "m/d1"
    routing.engines["m/d1"].fail(ErrorKind.UPSTREAM_UNAVAILABLE)
    assert await routing.served_by() == "m/spare"


async def test_a_model_without_deployments_is_unavailable() -> None:
    assert (await refused(make_routing(model("m")))).kind is ErrorKind.UNAVAILABLE


def test_an_unknown_model_names_close_ones() -> None:
    router = make_routing(model("smollm2-135m", provider("d"), aliases=("secret-name",))).router
    with pytest.raises(HelixError) as caught:
        router.route("smolm2-135m")
    assert "'smollm2-135m'" in caught.value.message
    assert (caught.value.kind, caught.value.param) == (ErrorKind.MODEL_NOT_FOUND, "model")
    with pytest.raises(HelixError) as caught:
        router.route("secret-nam", among={"other"})
    assert "secret-name" not in caught.value.message
    with pytest.raises(HelixError) as caught:
        router.route("x" * 100_000)
    assert len(caught.value.message) < 1000


async def test_a_call_is_served_by_what_it_was_admitted_for() -> None:
    before, after = in_turn(1), in_turn(1)
    call = make_call()
    call.route = before.router.route("m")
    before.router.replace(after.router.table)
    assert await before.served_by(call) == "m/d0"
    assert (before.counts(), after.counts()) == ({"m/d0": 1}, {"m/d0": 0})


async def test_another_table_changes_nothing_for_who_is_under_way() -> None:
    before, after = in_turn(1), in_turn(1)
    stream = await before.router.open(make_call())
    before.router.replace(after.router.table)
    assert await before.served_by() == "m/d0"
    assert (before.counts(), after.counts()) == ({"m/d0": 1}, {"m/d0": 1})
    assert before.targets["m/d0"].in_flight == 1
    stream.close()
    assert before.targets["m/d0"].in_flight == 0
