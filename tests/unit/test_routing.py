"""Who is tried, who waits, who is told to come back."""

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from helixflow.clients.pool import DeploymentView
from helixflow.core.call import Call, Progress, Stream, Usage
from helixflow.core.capacity import Replica
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ERRORS, ErrorKind, HelixError
from helixflow.routing.breaker import FAILURES_TO_OPEN, FIRST_PAUSE_S, LONGEST_PAUSE_S, Breaker
from helixflow.routing.router import Route, Router, Target
from helixflow.routing.slots import ReplicaSlots

ANSWER = cast(Stream, object())


class ScriptedEngine:
    """Answers, or fails with `kind`."""

    def __init__(self, kind: ErrorKind | None = None) -> None:
        self.kind = kind
        self.calls = 0

    async def open(self, call: Call) -> Stream:
        self.calls += 1
        if self.kind is not None:
            raise HelixError(self.kind, "no")
        return ANSWER


class Asking:
    model = "m"
    deadline = 0.0
    progress = Progress()


CALL = cast(Call, Asking())


def asking(deadline: float) -> Call:
    call = Asking()
    call.deadline = deadline
    return cast(Call, call)


def router(*engines: ScriptedEngine, clock: FakeClock | None = None) -> Router:
    clock = clock or FakeClock()
    return Router({"m": Route("m", [Target(f"m/{n}", engine, Breaker(clock)) for n, engine in enumerate(engines)])})


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
     ErrorKind.RATE_LIMITED],
)  # fmt: skip
async def test_the_next_deployment_is_tried(kind: ErrorKind) -> None:
    first, second = ScriptedEngine(kind), ScriptedEngine()
    assert await router(first, second).open(CALL) is ANSWER
    assert (first.calls, second.calls) == (1, 1)


@pytest.mark.parametrize("kind", [ErrorKind.INVALID_REQUEST, ErrorKind.CONTEXT_LENGTH_EXCEEDED, ErrorKind.DEADLINE])
async def test_what_another_deployment_cannot_better_is_raised(kind: ErrorKind) -> None:
    first, second = ScriptedEngine(kind), ScriptedEngine()
    with pytest.raises(HelixError) as caught:
        await router(first, second).open(CALL)
    assert caught.value.kind is kind
    assert second.calls == 0


async def test_the_last_failure_is_the_callers() -> None:
    with pytest.raises(HelixError) as caught:
        await router(ScriptedEngine(ErrorKind.LOADING), ScriptedEngine(ErrorKind.OVERLOADED)).open(CALL)
    assert caught.value.kind is ErrorKind.OVERLOADED


async def test_a_deployment_that_keeps_failing_is_left_alone_until_its_pause_is_over() -> None:
    clock = FakeClock()
    first, second = ScriptedEngine(ErrorKind.UPSTREAM_UNAVAILABLE), ScriptedEngine()
    routes = router(first, second, clock=clock)
    for _ in range(FAILURES_TO_OPEN + 3):
        await routes.open(CALL)
    assert first.calls == FAILURES_TO_OPEN
    first.kind = None
    clock.advance(FIRST_PAUSE_S)
    await routes.open(CALL)
    await routes.open(CALL)
    assert first.calls == FAILURES_TO_OPEN + 2


def test_a_breakers_pauses_grow_to_a_bound_and_one_trial_decides() -> None:
    clock = FakeClock()
    breaker = Breaker(clock)
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.fail()
    assert not breaker.is_open
    pause = FIRST_PAUSE_S
    for _ in range(8):
        breaker.fail()
        assert breaker.is_open
        assert breaker.retry_after_s == pause
        clock.advance(pause)
        assert not breaker.is_open
        breaker.begin()
        assert breaker.is_open
        pause = min(pause * 2, LONGEST_PAUSE_S)
    breaker.abandon()
    assert not breaker.is_open
    breaker.succeed()
    breaker.fail()
    assert not breaker.is_open


def test_an_unknown_model_names_close_ones() -> None:
    with pytest.raises(HelixError) as caught:
        Router({"smollm2-135m": Route("smollm2-135m", [])}).route("smolm2-135m")
    assert "'smollm2-135m'" in caught.value.message
    assert (caught.value.kind, caught.value.param) == (ErrorKind.MODEL_NOT_FOUND, "model")
    with pytest.raises(HelixError) as caught:
        Router({}).route("x" * 100_000)
    assert len(caught.value.message) < 1000


def replica(name: str = "r1", slots: int = 1) -> Replica:
    return Replica(name, "127.0.0.1", 1, "key", slots, 100)


def view(state: str, *replicas: Replica) -> DeploymentView:
    return DeploymentView("d", state, "", 0, 0, replicas)


def make_slots(
    *, max_queue: int = 8, load_wait_s: float = 30, asked: list[str] | None = None, probation_s: float = 1.0
) -> ReplicaSlots:
    loads: list[str] = [] if asked is None else asked
    return ReplicaSlots(
        "d", max_queue=max_queue, load_wait_s=load_wait_s, request_load=loads.append, probation_s=probation_s
    )


def soon() -> float:
    return asyncio.get_running_loop().time() + 30


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def test_slots_are_never_exceeded_and_go_to_who_waited_longest() -> None:
    slots = make_slots()
    slots.update(view("ready", replica(slots=2)))
    leases = [await slots.acquire(asking(soon())), await slots.acquire(asking(soon()))]
    order: list[int] = []

    async def wait(number: int) -> None:
        lease = await slots.acquire(asking(soon()))
        order.append(number)
        lease.release()

    waiting = []
    for number in range(4):
        waiting.append(asyncio.create_task(wait(number)))
        await until(lambda n=number: slots.queued == n + 1)  # type: ignore[misc]
    assert slots.in_flight == 2
    leases[0].release()
    leases[0].release()
    await asyncio.gather(*waiting)
    assert order == [0, 1, 2, 3]
    leases[1].release()
    assert (slots.in_flight, slots.queued) == (0, 0)


async def test_a_full_queue_is_refused_with_a_time_to_come_back() -> None:
    slots = make_slots(max_queue=0)
    slots.update(view("ready", replica()))
    await slots.acquire(asking(soon()))
    with pytest.raises(HelixError) as caught:
        await slots.acquire(asking(soon()))
    assert caught.value.kind is ErrorKind.OVERLOADED
    assert caught.value.retry_after_s


async def test_a_wait_ends_at_its_deadline_and_leaks_no_slot() -> None:
    slots = make_slots()
    slots.update(view("ready", replica()))
    lease = await slots.acquire(asking(soon()))
    with pytest.raises(HelixError) as caught:
        await slots.acquire(asking(asyncio.get_running_loop().time() + 0.001))
    assert caught.value.kind is ErrorKind.OVERLOADED
    assert slots.queued == 0
    lease.release()
    (await slots.acquire(asking(soon()))).release()
    assert slots.in_flight == 0


@pytest.mark.parametrize("release_first", [True, False])
async def test_a_client_that_leaves_while_it_is_granted_a_slot_leaks_none(release_first: bool) -> None:
    slots = make_slots()
    slots.update(view("ready", replica()))
    lease = await slots.acquire(asking(soon()))
    first = asyncio.create_task(slots.acquire(asking(soon())))
    second = asyncio.create_task(slots.acquire(asking(soon())))
    await until(lambda: slots.queued == 2)
    for step in (lease.release, first.cancel) if release_first else (first.cancel, lease.release):
        step()
    granted = await second
    assert first.cancelled() or first.cancelling()
    assert slots.in_flight == 1
    granted.release()
    assert slots.in_flight == 0


async def test_those_who_wait_outlive_their_replica() -> None:
    asked: list[str] = []
    slots = make_slots(asked=asked)
    slots.update(view("ready", replica()))
    lease = await slots.acquire(asking(soon()))
    waiting = asyncio.create_task(slots.acquire(asking(soon())))
    await until(lambda: slots.queued == 1)
    slots.update(view("idle"))
    await until(lambda: asked == ["d"])
    slots.update(view("ready", replica("r2")))
    got = await waiting
    assert got.replica.replica_id == "r2"
    lease.release()
    got.release()
    assert slots.in_flight == 0


async def test_those_who_wait_learn_that_the_deployment_failed() -> None:
    slots = make_slots()
    slots.update(view("ready", replica()))
    await slots.acquire(asking(soon()))
    waiting = asyncio.create_task(slots.acquire(asking(soon())))
    await until(lambda: slots.queued == 1)
    slots.update(view("failed"))
    with pytest.raises(HelixError) as caught:
        await waiting
    assert caught.value.kind is ErrorKind.UPSTREAM_UNAVAILABLE


async def test_an_idle_deployment_is_loaded_once_and_loading_has_a_limit() -> None:
    asked: list[str] = []
    slots = make_slots(asked=asked, load_wait_s=0.001)
    slots.update(view("idle"))
    with pytest.raises(HelixError) as caught:
        await slots.acquire(asking(soon()))
    assert caught.value.kind is ErrorKind.LOADING
    assert caught.value.retry_after_s
    assert asked == ["d"]


async def test_a_replica_that_failed_is_avoided_while_another_is_free() -> None:
    slots = make_slots()
    slots.update(view("ready", replica("r1", 2), replica("r2", 2)))
    first = await slots.acquire(asking(soon()))
    first.release(failed=True)
    names = {(await slots.acquire(asking(soon()))).replica.replica_id for _ in range(2)}
    assert names == {"r1", "r2"} - {first.replica.replica_id}


async def test_the_only_replica_is_not_asked_again_until_its_probation_is_over() -> None:
    slots = make_slots(probation_s=0.02)
    slots.update(view("ready", replica("r1", 2)))
    (await slots.acquire(asking(soon()))).release(failed=True)
    waiting = asyncio.create_task(slots.acquire(asking(soon())))
    await asyncio.sleep(0)
    assert slots.queued == 1
    assert (await waiting).replica.replica_id == "r1"


async def test_a_request_after_a_crash_gets_the_next_replica() -> None:
    slots = make_slots(probation_s=60)
    slots.update(view("ready", replica("r1", 2)))
    (await slots.acquire(asking(soon()))).release(failed=True)
    waiting = asyncio.create_task(slots.acquire(asking(soon())))
    await asyncio.sleep(0)
    slots.update(view("backoff"))
    await asyncio.sleep(0)
    assert not waiting.done()
    slots.update(view("ready", replica("r2", 2)))
    assert (await waiting).replica.replica_id == "r2"


async def test_what_a_failed_attempt_made_is_not_paid() -> None:
    class Half(ScriptedEngine):
        async def open(self, call: Call) -> Stream:
            call.progress.usage.completion_tokens = 90
            call.progress.usage.reported = True
            call.progress.first_content_at = 1.0
            return await super().open(call)

    class Fresh:
        model = "m"

        def __init__(self) -> None:
            self.progress = Progress()

    call = Fresh()
    await router(Half(ErrorKind.UPSTREAM_UNAVAILABLE), ScriptedEngine()).open(cast(Call, call))
    assert (call.progress.usage, call.progress.first_content_at) == (Usage(), None)
    assert call.progress.attempts == (("m/0", "upstream_unavailable"),)
    assert call.progress.deployment == "m/1"
