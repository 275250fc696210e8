"""Which limits and budgets a gateway takes to hold: asked for once, forgotten when told, never taken for none."""

import asyncio
from collections.abc import Awaitable, Callable

import grpc
import pytest

from helixflow.clients.changes import ChangeWatch
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.principal import Principal, PrincipalKind
from helixflow.metering.policies import Budget, Limit, Metric, Period, Policies, Scope, Unit
from helixflow.metering.policy_cache import MAX_LOOKUPS, RETRY_S, PolicyCache
from helixflow.rpc.errors import to_status
from helixflow.rpc.generated.auth_v1 import identity_pb2, metering_pb2
from tests.harness.tokens import change, snapshot

GRACE_S = 300.0


def key(name: str, organisation: str = "org_1", *, project: str = "proj_1", owner: str = "user_1") -> Principal:
    return Principal(PrincipalKind.KEY, f"key_{name}", name, organisation, project, owner)


def account(name: str, organisation: str = "org_1", project: str = "proj_1") -> Principal:
    return Principal(PrincipalKind.ACCOUNT, f"user_{name}", name, organisation, project, session_id="ses_1")


def limit(name: str, *, scope: Scope = Scope.ORGANISATION, subject: str = "org_1", model: str = "") -> Limit:
    organisation = "" if scope is Scope.INSTALLATION else "org_1"
    return Limit(f"limit_{name}", organisation, scope, subject, model, Metric.REQUESTS_PER_MINUTE, 60, 10)


class FakeAuth:
    """Stands for the channel: answers ResolvePolicies, and counts."""

    def __init__(self) -> None:
        self.limits: list[Limit] = []
        self.budgets: list[Budget] = []
        self.predecessors: list[str] = []
        self.failure: ErrorKind | None = None
        self.before_answer: Callable[[], Awaitable[None]] | None = None
        self.asked: list[metering_pb2.ResolvePoliciesRequest] = []

    def unary_unary(self, method: str, **_: object) -> Callable[..., Awaitable[object]]:
        async def call(
            request: metering_pb2.ResolvePoliciesRequest, timeout: float
        ) -> metering_pb2.ResolvePoliciesResponse:
            assert timeout == 2.0
            self.asked.append(request)
            answer = metering_pb2.ResolvePoliciesResponse(
                limits=[
                    metering_pb2.PolicyLimit(
                        id=found.id,
                        scope=found.scope.value,  # type: ignore[arg-type]
                        subject_id=found.subject_id,
                        model=found.model,
                        metric=found.metric.value,  # type: ignore[arg-type]
                        value=found.value,
                        burst=found.burst,
                    )
                    for found in self.limits
                ],
                budgets=[
                    metering_pb2.PolicyBudget(
                        id=found.id,
                        scope=found.scope.value,  # type: ignore[arg-type]
                        subject_id=found.subject_id,
                        unit=found.unit.value,  # type: ignore[arg-type]
                        period=found.period.value,  # type: ignore[arg-type]
                        cap=found.cap,
                    )
                    for found in self.budgets
                ],
                predecessors=self.predecessors,
            )
            if self.before_answer is not None:
                await self.before_answer()
            if self.failure is not None:
                status, details, trailing = to_status(HelixError(self.failure, "m"))
                raise grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details=details)
            return answer

        return call

    def unary_stream(self, method: str, **_: object) -> None:
        return None


class Bench:
    """A cache before a scripted auth service, with a watch that stands, at revision 1, unless told otherwise."""

    def __init__(self, *, size: int = 100, watched: bool = True) -> None:
        self.clock = FakeClock()
        self.auth = FakeAuth()
        self.watch = ChangeWatch(self.auth, clock=self.clock)  # type: ignore[arg-type]
        self.cache = PolicyCache(
            self.auth,  # type: ignore[arg-type]
            self.watch,
            size=size,
            grace_s=GRACE_S,
            clock=self.clock,
        )
        if watched:
            self.begins(1)

    def begins(self, revision: int) -> None:
        self.watch._on_message(snapshot(revision), True)

    def told(self, revision: int, of: str, kind: int = identity_pb2.CHANGE_KIND_POLICIES) -> None:
        self.watch._on_message(change(revision, kind, of), False)

    def loses_watch(self) -> None:
        self.watch._on_lost()

    async def refused(self, principal: Principal, model: str = "m") -> ErrorKind:
        with pytest.raises(HelixError) as caught:
            await self.cache.resolve(principal, model)
        return caught.value.kind


async def test_it_asks_once_for_whom_the_key_is_and_keeps_the_answer() -> None:
    bench = Bench()
    bench.auth.limits = [limit("own"), limit("all", scope=Scope.INSTALLATION, subject="")]
    bench.auth.budgets = [Budget("budget_1", "org_1", Scope.KEY, "key_a", Unit.MONEY, Period.MONTH, 10**9)]
    assert bench.cache.cached(key("a"), "m") is None
    found = await bench.cache.resolve(key("a"), "m")
    assert found == Policies(tuple(bench.auth.limits), tuple(bench.auth.budgets))
    bench.clock.advance(86_400)
    assert bench.cache.cached(key("a"), "m") is found
    (asked,) = bench.auth.asked
    assert (asked.organisation_id, asked.project_id, asked.user_id, asked.key_id) == (
        *("org_1", "proj_1", "user_1", "key_a"),
    )


async def test_who_has_signed_in_is_asked_for_as_a_user_in_their_project() -> None:
    bench = Bench()
    places = [account("a"), account("a", project="proj_2"), account("a", project=""), account("a", "org_2", "")]
    for place in places:
        await bench.cache.resolve(place, "m")
    for place in places:
        assert bench.cache.cached(place, "m") is not None
    assert {(asked.user_id, asked.key_id) for asked in bench.auth.asked} == {("user_a", "")}
    assert [(asked.organisation_id, asked.project_id) for asked in bench.auth.asked] == [
        *(("org_1", "proj_1"), ("org_1", "proj_2"), ("org_1", ""), ("org_2", "")),
    ]


async def test_a_limit_of_one_model_holds_for_that_model_alone() -> None:
    bench = Bench()
    small, large, any_model = limit("small", model="small"), limit("large", model="large"), limit("any")
    bench.auth.limits = [small, large, any_model]
    assert (await bench.cache.resolve(key("a"), "small")).limits == (small, any_model)
    assert [bench.cache.cached(key("a"), model) for model in ("small", "large", "other")] == [
        Policies((small, any_model)),
        Policies((large, any_model)),
        Policies((any_model,)),
    ]
    assert len(bench.auth.asked) == 1


async def test_what_changes_is_forgotten_and_nothing_else() -> None:
    bench = Bench()
    mine, theirs = key("a"), key("b", "org_2")
    for principal in (mine, theirs):
        await bench.cache.resolve(principal, "m")
    bench.told(2, "org_1", identity_pb2.CHANGE_KIND_ORGANISATION)
    bench.told(3, "", identity_pb2.CHANGE_KIND_PRICES)
    assert bench.cache.cached(mine, "m") is not None
    bench.told(4, "org_1")
    assert bench.cache.cached(mine, "m") is None and bench.cache.cached(theirs, "m") is not None
    await bench.cache.resolve(mine, "m")
    bench.told(5, "")
    assert bench.cache.cached(mine, "m") is None and bench.cache.cached(theirs, "m") is None
    assert len(bench.cache) == 0


async def test_a_watch_that_missed_changes_makes_it_forget_and_one_that_did_not_leaves_it() -> None:
    bench = Bench()
    await bench.cache.resolve(key("a"), "m")
    bench.loses_watch()
    bench.begins(1)
    assert bench.cache.cached(key("a"), "m") is not None
    bench.loses_watch()
    bench.begins(2)
    assert bench.cache.cached(key("a"), "m") is None


@pytest.mark.parametrize("told", ["org_1", ""])
async def test_an_answer_that_a_change_overtakes_is_asked_for_again(told: str) -> None:
    bench = Bench()

    async def impose() -> None:
        if len(bench.auth.asked) == 1:
            bench.auth.limits = [limit("new")]
            bench.told(2, told)

    bench.auth.before_answer = impose
    assert (await bench.cache.resolve(key("a"), "m")).limits == (limit("new"),)
    assert len(bench.auth.asked) == 2


async def test_a_change_of_somebody_else_does_not_disturb_an_answer() -> None:
    bench = Bench()

    async def other() -> None:
        bench.told(2, "org_2")

    bench.auth.before_answer = other
    await bench.cache.resolve(key("a"), "m")
    assert len(bench.auth.asked) == 1


async def test_answers_that_are_always_overtaken_are_given_up() -> None:
    bench = Bench()

    async def change_again() -> None:
        bench.told(1 + len(bench.auth.asked), "org_1")

    bench.auth.before_answer = change_again
    assert await bench.refused(key("a")) is ErrorKind.UNAVAILABLE
    assert len(bench.auth.asked) == 3 and len(bench.cache) == 0


async def test_callers_share_one_question_and_one_may_leave() -> None:
    bench = Bench()
    gate = asyncio.Event()

    async def wait() -> None:
        await gate.wait()

    bench.auth.before_answer = wait
    callers = [asyncio.create_task(bench.cache.resolve(key("a"), f"m{n}")) for n in range(5)]
    await asyncio.sleep(0)
    callers[0].cancel()
    await asyncio.gather(callers[0], return_exceptions=True)
    gate.set()
    assert await asyncio.gather(*callers[1:]) == [Policies()] * 4
    assert len(bench.auth.asked) == 1


async def test_whoever_waits_while_it_closes_is_told() -> None:
    bench = Bench()
    gate = asyncio.Event()

    async def wait() -> None:
        await gate.wait()

    bench.auth.before_answer = wait
    caller = asyncio.create_task(bench.refused(key("a")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await bench.cache.close()
    assert await caller is ErrorKind.UNAVAILABLE


async def test_without_auth_the_known_go_on_for_the_grace_and_the_unknown_are_refused() -> None:
    bench = Bench()
    bench.auth.limits = [limit("a")]
    await bench.cache.resolve(key("a"), "m")
    bench.loses_watch()
    bench.auth.failure = ErrorKind.UNAVAILABLE
    assert await bench.refused(key("b")) is ErrorKind.UNAVAILABLE
    # A watch that comes back soon costs nobody anything.
    bench.clock.advance(RETRY_S - 0.1)
    assert bench.cache.cached(key("a"), "m") is not None
    bench.clock.advance(0.1)
    assert bench.cache.cached(key("a"), "m") is None
    assert (await bench.cache.resolve(key("a"), "m")).limits == (limit("a"),)
    # It is not asked for again with every request.
    assert bench.cache.cached(key("a"), "m") is not None
    bench.clock.advance(GRACE_S - RETRY_S - 0.1)
    assert (await bench.cache.resolve(key("a"), "m")).limits == (limit("a"),)
    bench.clock.advance(0.1)
    assert await bench.refused(key("a")) is ErrorKind.UNAVAILABLE
    bench.auth.failure = None
    assert (await bench.cache.resolve(key("a"), "m")).limits == (limit("a"),)


async def test_without_a_watch_what_is_known_is_asked_for_again_every_few_seconds() -> None:
    bench = Bench(watched=False)
    await bench.cache.resolve(key("a"), "m")
    bench.auth.limits = [limit("new")]
    bench.clock.advance(RETRY_S - 0.1)
    assert (await bench.cache.resolve(key("a"), "m")).limits == ()
    bench.clock.advance(0.1)
    assert (await bench.cache.resolve(key("a"), "m")).limits == (limit("new"),)


async def test_what_was_asked_for_without_a_watch_counts_no_more_once_one_stands() -> None:
    bench = Bench(watched=False)
    await bench.cache.resolve(key("a"), "m")
    bench.begins(1)
    assert bench.cache.cached(key("a"), "m") is None


async def test_too_many_at_once_are_refused_but_those_that_are_known() -> None:
    bench = Bench(size=2 * MAX_LOOKUPS)
    await bench.cache.resolve(key("known"), "m")
    bench.loses_watch()
    bench.clock.advance(RETRY_S)
    gate = asyncio.Event()

    async def wait() -> None:
        await gate.wait()

    bench.auth.before_answer = wait
    callers = [asyncio.create_task(bench.cache.resolve(key(str(n)), "m")) for n in range(MAX_LOOKUPS)]
    await asyncio.sleep(0)
    assert await bench.refused(key("one more")) is ErrorKind.OVERLOADED
    assert await bench.cache.resolve(key("known"), "m") == Policies()
    gate.set()
    await asyncio.gather(*callers)


async def test_it_keeps_as_many_as_it_may() -> None:
    bench = Bench(size=2)
    for name in ("a", "b", "c"):
        await bench.cache.resolve(key(name), "m")
    assert [bench.cache.cached(key(name), "m") is not None for name in ("a", "b", "c")] == [False, True, True]
    assert len(bench.cache) == 2
    bench.told(2, "org_1")
    assert len(bench.cache) == 0 and not bench.cache._of_organisation


async def test_principals_share_what_is_the_same() -> None:
    bench = Bench()
    bench.auth.limits = [limit("a")]
    assert await bench.cache.resolve(key("a"), "m") is await bench.cache.resolve(key("b"), "m")


async def test_a_limit_that_only_a_newer_version_knows_is_not_taken_for_none() -> None:
    bench = Bench()

    class Newer:
        value = 99

    bench.auth.limits = [limit("a")]
    object.__setattr__(bench.auth.limits[0], "metric", Newer)
    assert await bench.refused(key("a")) is ErrorKind.UPSTREAM_INVALID


async def test_a_rotated_key_has_what_is_on_its_predecessors() -> None:
    bench = Bench()
    bench.auth.budgets = [Budget("budget_1", "org_1", Scope.KEY, "key_a", Unit.MONEY, Period.MONTH, 10**9)]
    bench.auth.predecessors = ["key_b", "key_a"]
    found = await bench.cache.resolve(key("c"), "m")
    assert (found.budgets, found.predecessors) == (tuple(bench.auth.budgets), ("key_a", "key_b"))


async def test_who_is_asked_for_again_has_the_same_policies_as_before_however_many_there_are() -> None:
    size = 5_000
    bench = Bench(size=size)
    shared = limit("all", model="m")
    found = []
    for round_ in range(2):
        for number in range(size):
            bench.auth.limits = [shared, limit(f"of_{number}", scope=Scope.KEY, subject=f"key_{number}")]
            policies = await bench.cache.resolve(key(str(number)), "m")
            if round_ == 0:
                found.append(policies)
            assert policies is found[number]
            assert policies.limits[0] is found[0].limits[0]
        bench.cache.forget()
    # Another gateway in the same process has nothing to do with it.
    other = Bench()
    other.auth.limits = bench.auth.limits
    assert await other.cache.resolve(key("x"), "m") == found[-1]
    assert await other.cache.resolve(key("x"), "m") is not found[-1]
