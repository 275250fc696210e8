"""Who waits for a slot, and who is told to come back."""

import asyncio
from collections.abc import Callable

import pytest

from helixflow.clients.pool import DeploymentView
from helixflow.core.call import Call
from helixflow.core.capacity import Replica
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.routing.slots import ReplicaSlots
from tests.harness.routing import make_call
from tests.harness.virtual_time import VirtualTimeLoop


def asking(deadline: float) -> Call:
    return make_call(deadline=deadline)


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


def test_when_its_node_has_gone_who_waits_is_told_after_a_grace_and_others_at_once() -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(_gone_and_back())


async def _gone_and_back() -> None:
    loop = asyncio.get_running_loop()
    slots = make_slots(load_wait_s=60)
    slots.update(view("ready", replica()))
    lease = await slots.acquire(asking(soon()))
    waiting = asyncio.create_task(slots.acquire(asking(loop.time() + 600)))
    await until(lambda: slots.queued == 1)
    began = loop.time()
    slots.update(view("gone"))
    with pytest.raises(HelixError, match="No node serves") as caught:
        await waiting
    assert caught.value.kind is ErrorKind.NOT_SERVED
    assert caught.value.retry_after_s
    assert 2 < loop.time() - began < 10
    slots.update(view("gone"))
    began = loop.time()
    with pytest.raises(HelixError, match="No node serves"):
        await slots.acquire(asking(loop.time() + 600))
    assert loop.time() == began
    slots.update(view("loading"))
    waiting = asyncio.create_task(slots.acquire(asking(loop.time() + 600)))
    await asyncio.sleep(30)
    slots.update(view("gone"))
    await asyncio.sleep(1)
    slots.update(view("ready", replica("r2")))
    assert (await waiting).replica.replica_id == "r2", "it was back within the grace"
    lease.release()


async def test_another_pool_is_asked_when_the_one_that_was_loading_is_drained() -> None:
    asked: list[str] = []
    slots = make_slots(asked=asked)
    slots.update(view("idle"))
    waiting = asyncio.create_task(slots.acquire(asking(soon())))
    await until(lambda: len(asked) == 1)
    slots.update(view("loading"))
    for _ in range(3):
        await asyncio.sleep(0)
    slots.update(view("idle"))  # the first one drains, another one has it too
    await until(lambda: len(asked) == 2)
    slots.update(view("ready", replica()))
    (await waiting).release()


async def test_who_waits_for_a_pool_that_is_then_drained_is_told_at_once() -> None:
    slots = make_slots()
    slots.update(view("ready", replica()))
    lease = await slots.acquire(asking(soon()))
    waiting = asyncio.create_task(slots.acquire(asking(soon())))
    await until(lambda: slots.queued == 1)
    slots.update(view("draining"))
    with pytest.raises(HelixError) as caught:
        await waiting
    assert caught.value.kind is ErrorKind.LOADING
    assert caught.value.retry_after_s
    lease.release()


@pytest.mark.parametrize("served", [True, False])
async def test_who_waits_for_a_deployment_that_is_then_removed_is_told_at_once(served: bool) -> None:
    slots = make_slots()
    slots.update(view("ready", replica()) if served else view("loading"))
    lease = await slots.acquire(asking(soon())) if served else None
    waiting = asyncio.create_task(slots.acquire(asking(soon())))
    await until(lambda: slots.queued == 1 or not served)
    await asyncio.sleep(0)
    slots.close()
    with pytest.raises(HelixError) as caught:
        await waiting
    assert caught.value.kind is ErrorKind.OVERLOADED, "another deployment of the model may be tried"
    assert caught.value.retry_after_s
    with pytest.raises(HelixError):
        await slots.acquire(asking(soon()))
    if lease is not None:
        lease.release()
    assert (slots.in_flight, slots.queued) == (0, 0)


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
