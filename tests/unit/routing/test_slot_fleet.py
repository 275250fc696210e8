"""Several gateways and one broker, in virtual time: slots are never granted twice, and shared fairly over all."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.routing.slot_desk import Standing
from tests.harness.slot_fleet import Engines, Gateway, Pool, call_of, flood, until
from tests.harness.virtual_time import VirtualTimeLoop


def run(scenario: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(scenario)


@asynccontextmanager
async def fleet(slots: dict[str, int], gateways: int = 3, **options: Any) -> AsyncIterator[tuple[Pool, list[Gateway]]]:
    pool = Pool(Engines(slots), **options)
    running = asyncio.create_task(pool.run())
    members = [Gateway(f"g{number}", pool) for number in range(gateways)]
    for gateway in members:
        gateway.connect()
    await until(lambda: all(gateway.desk.standing is Standing.CONNECTED for gateway in members))
    try:
        yield pool, members
    finally:
        running.cancel()
        for gateway in members:
            await gateway.kill()
            gateway.slots.close()
        await asyncio.gather(running, return_exceptions=True)


def granted(gateway: Gateway) -> int:
    return sum(seat.granted for seat in gateway.desk.seats.values())


def test_slots_are_lent_ahead_evenly_and_to_the_only_one_all() -> None:
    async def scenario() -> None:
        async with fleet({"r1": 4, "r2": 5}, 1) as (pool, members):
            await until(lambda: granted(members[0]) == 9)
        async with fleet({"r1": 4, "r2": 5}, 3) as (pool, members):
            await until(lambda: [granted(gateway) for gateway in members] == [3, 3, 3])
            assert pool.broker is not None
            assert pool.broker.stock.free() == {}

    run(scenario())


def test_what_was_lent_ahead_is_used_without_asking() -> None:
    async def scenario() -> None:
        async with fleet({"r1": 3}, 3) as (_, (one, *_others)):
            await until(lambda: granted(one) == 1)
            lease = one.slots.acquire(call_of("o"))
            with pytest.raises(StopIteration):
                lease.send(None)  # it did not have to wait for anything

    run(scenario())


def test_slots_that_others_do_not_use_come_to_who_needs_them() -> None:
    async def scenario() -> None:
        async with fleet({"r1": 6}, 3) as (_, (one, *others)):
            await until(lambda: granted(one) == 2)
            leases = [await one.slots.acquire(call_of("o")) for _ in range(6)]
            assert granted(one) == 6
            for lease in leases:
                lease.release()
            # And back to others.
            await asyncio.gather(*(others[0].slots.acquire(call_of("p")) for _ in range(6)))

    run(scenario())


@pytest.mark.parametrize("weights", [{"a": 100, "b": 100, "c": 100}, {"a": 100, "b": 200, "c": 500}])
def test_tokens_are_shared_by_weight_over_three_gateways(weights: dict[str, int]) -> None:
    async def scenario() -> None:
        rng = random.Random(1)
        used: Counter[str] = Counter()
        # Who has many clients, long answers, or is at one gateway only, gets no more for it.
        shapes = {"a": (24, 0.4, 40, (0,)), "b": (8, 0.1, 10, (0, 1)), "c": (12, 1.0, 100, (1, 2))}
        async with fleet({"r1": 4, "r2": 4}, 3) as (_, members):
            floods = [
                asyncio.create_task(
                    flood(
                        members[place],
                        lambda name=name: call_of(name, weight=weights[name]),  # type: ignore[misc]
                        used,
                        clients=clients,
                        held_s=held_s,
                        tokens=tokens,
                        rng=rng,
                    )
                )
                for name, (clients, held_s, tokens, places) in shapes.items()
                for place in places
            ]
            await asyncio.sleep(5)
            used.clear()
            await asyncio.sleep(40)
            for task in floods:
                task.cancel()
            await asyncio.gather(*floods, return_exceptions=True)
        whole, all_weights = sum(used.values()), sum(weights.values())
        for name, weight in weights.items():
            assert used[name] / whole == pytest.approx(weight / all_weights, rel=0.1)
        assert whole > 0.95 * 8 * 100 * 40  # the engines were kept busy

    run(scenario())


def test_one_that_comes_rarely_waits_little_while_another_floods() -> None:
    async def scenario() -> None:
        used: Counter[str] = Counter()
        waits = []
        async with fleet({"r1": 8}, 3) as (_, members):
            flooding = asyncio.create_task(
                flood(
                    members[0], lambda: call_of("flood"), used, clients=100, held_s=1, tokens=10, rng=random.Random(2)
                )
            )
            await asyncio.sleep(5)
            loop = asyncio.get_running_loop()
            for _ in range(50):
                began = loop.time()
                lease = await members[1].slots.acquire(call_of("rare"))
                waits.append(loop.time() - began)
                await asyncio.sleep(0.2)
                lease.release()
                await asyncio.sleep(0.5)
            flooding.cancel()
            await asyncio.gather(flooding, return_exceptions=True)
        # Eight slots are freed each second, one of the first is its.
        assert sorted(waits)[47] < 2 / 8 + 0.15

    run(scenario())


def test_the_slots_of_a_killed_gateway_come_back_once_its_sockets_are_closed() -> None:
    async def scenario() -> None:
        async with fleet({"r1": 6}, 3) as (pool, members):
            for _ in range(6):
                members[0].serve(call_of("o"), 100, 10)
            await until(lambda: pool.engines.running["r1"] == 6)
            assert pool.broker is not None
            killed = asyncio.create_task(members[0].kill(sockets_close_s=5))
            waiting = [asyncio.create_task(members[1].slots.acquire(call_of("p"))) for _ in range(6)]
            await asyncio.sleep(4.9)
            assert not any(task.done() for task in waiting)
            await killed
            async with asyncio.timeout(3):
                await asyncio.gather(*waiting)

    run(scenario())


def test_a_busy_gateway_does_not_keep_those_of_a_killed_one_away() -> None:
    async def scenario() -> None:
        async with fleet({"r1": 6}, 2) as (pool, (first, second)):
            await until(lambda: granted(first) == granted(second) == 3)
            for gateway in (first, second):
                for _ in range(3):
                    gateway.serve(call_of("o"), 1000, 10)
            await until(lambda: pool.engines.running["r1"] == 6)
            await asyncio.sleep(1)
            await first.kill()
            async with asyncio.timeout(4):
                await asyncio.gather(*(second.slots.acquire(call_of("o")) for _ in range(3)))

    run(scenario())


def test_a_restarted_pool_grants_nothing_that_is_in_use() -> None:
    async def scenario() -> None:
        async with fleet({"r1": 6}, 3) as (pool, members):
            for gateway in members[:2]:
                for _ in range(3):
                    gateway.serve(call_of("o"), 20, 10)
            await until(lambda: pool.engines.running["r1"] == 6)
            pool.kill()
            for gateway in members:
                gateway.disconnect()
            await asyncio.sleep(0.5)
            pool.start()
            members[2].connect()
            waiting = asyncio.create_task(members[2].slots.acquire(call_of("p")))
            await asyncio.sleep(0.5)
            members[0].connect()
            await asyncio.sleep(10)
            # The second one never came back, but its generations go on.
            assert not waiting.done()
            assert pool.engines.running["r1"] == 6
            await waiting

    run(scenario())


def test_without_the_pool_each_gateway_goes_on_with_its_share() -> None:
    async def scenario() -> None:
        async with fleet({"r1": 4, "r2": 3}, 3) as (pool, members):
            pool.kill()
            for gateway in members:
                gateway.disconnect()
            await asyncio.sleep(2)
            for gateway in members:
                for _ in range(20):
                    gateway.serve(call_of("o"), 1, 10)
            await asyncio.sleep(0.5)
            running = {gateway.name: gateway.slots.in_flight for gateway in members}
            assert sum(running.values()) == 7
            assert min(running.values()) >= 7 // 3
            assert [gateway.slots.queued for gateway in members] == [20 - n for n in running.values()]
            await asyncio.sleep(20)
            assert all(gateway.slots.queued == 0 for gateway in members)

    run(scenario())


def test_fewer_slots_than_gateways_keep_at_least_one_serving_without_the_pool() -> None:
    async def scenario() -> None:
        async with fleet({"r1": 1}, 3) as (pool, members):
            pool.kill()
            for gateway in members:
                gateway.disconnect()
            await asyncio.sleep(2)
            tasks = [gateway.serve(call_of("o"), 1, 10) for gateway in members]
            await asyncio.sleep(5)
            assert sum(task.done() for task in tasks) == 1

    run(scenario())


def test_who_waited_when_the_pool_went_waits_on_and_is_served_when_it_is_back() -> None:
    async def scenario() -> None:
        async with fleet({"r1": 1}, 2) as (pool, members):
            lease = await members[1].slots.acquire(call_of("o"))
            waiting = asyncio.create_task(members[0].slots.acquire(call_of("p")))
            await until(lambda: members[0].desk.queued == 1)
            pool.kill()
            for gateway in members:
                gateway.disconnect()
            await asyncio.sleep(0.2)
            pool.start()
            for gateway in members:
                gateway.connect()
            await asyncio.sleep(3)
            assert not waiting.done()
            lease.release()
            (await waiting).release()

    run(scenario())


def test_a_full_queue_is_one_over_all_gateways() -> None:
    async def scenario() -> None:
        async with fleet({"r1": 1}, 2, max_queue=2) as (_, (one, two)):
            await one.slots.acquire(call_of("o"))
            await asyncio.sleep(0.5)
            waiting = [asyncio.create_task(gateway.slots.acquire(call_of("o"))) for gateway in (one, two)]
            await until(lambda: one.desk.queued == 2)
            assert {one.slots.first_place, two.slots.first_place} == {1, 2} or one.slots.first_place == 1
            with pytest.raises(HelixError) as caught:
                await two.slots.acquire(call_of("p"))
            assert caught.value.kind is ErrorKind.OVERLOADED
            assert caught.value.retry_after_s
            assert two.slots.figures.refused == 1
            for task in waiting:
                task.cancel()
            await until(lambda: one.desk.queued == 0)

    run(scenario())


def test_a_wait_beyond_the_deadline_is_refused_at_once() -> None:
    async def scenario() -> None:
        async with fleet({"r1": 1}, 1) as (_, (one,)):
            for _ in range(4):
                await one.serve(call_of("o"), 10, 10)
            for _ in range(3):
                one.serve(call_of("o"), 10, 10)
            await asyncio.sleep(1)
            began = asyncio.get_running_loop().time()
            with pytest.raises(HelixError) as caught:
                await one.slots.acquire(call_of("o", left_s=5))
            assert asyncio.get_running_loop().time() - began < 0.1
            assert caught.value.kind is ErrorKind.OVERLOADED
            assert caught.value.retry_after_s == pytest.approx(3 * 10 - 5, rel=0.3)

    run(scenario())


def test_priorities_hold_over_all_gateways() -> None:
    async def scenario() -> None:
        async with fleet({"r1": 1}, 2) as (_, (one, two)):
            lease = await one.slots.acquire(call_of("o"))
            low = asyncio.create_task(one.slots.acquire(call_of("o")))
            await until(lambda: two.desk.queued == 1)
            high = asyncio.create_task(two.slots.acquire(call_of("p", priority=1)))
            await until(lambda: one.desk.queued == 2)
            lease.release()
            (await high).release()
            (await low).release()

    run(scenario())


def test_a_replica_that_failed_is_avoided_by_who_waits_in_the_pool() -> None:
    async def scenario() -> None:
        async with fleet({"r1": 1, "r2": 1}, 2) as (_, (one, _other)):
            leases = [await one.slots.acquire(call_of("o")) for _ in range(2)]
            waiting = asyncio.create_task(one.slots.acquire(call_of("o")))
            await until(lambda: one.desk.queued == 1)
            failed = leases[0].replica.replica_id
            leases[0].release(failed=True)
            await asyncio.sleep(0.5)
            assert not waiting.done()
            leases[1].release()
            assert (await waiting).replica.replica_id == leases[1].replica.replica_id != failed

    run(scenario())


def test_a_replica_that_leaves_is_given_back_and_gets_nothing_new() -> None:
    async def scenario() -> None:
        async with fleet({"r1": 2, "r2": 2}, 2) as (pool, members):
            assert pool.broker is not None
            leases = [await members[0].slots.acquire(call_of("o")) for _ in range(2)]
            pool.broker.update(pool.engines.slots, closing={"r1"})
            await asyncio.sleep(0.1)
            mine = sum(lease.replica.replica_id == "r1" for lease in leases)
            assert pool.broker.held_of("r1") == mine
            for lease in leases:
                lease.release()
            await until(lambda: pool.broker is not None and pool.broker.held_of("r1") == 0)
            more = [await members[1].slots.acquire(call_of("o")) for _ in range(2)]
            assert {lease.replica.replica_id for lease in more} == {"r2"}

    run(scenario())


def test_a_slot_granted_before_its_replica_is_shown_is_used_when_it_is() -> None:
    async def scenario() -> None:
        async with fleet({"r1": 1}, 1) as (pool, (one,)):
            await one.slots.acquire(call_of("o"))
            waiting = asyncio.create_task(one.slots.acquire(call_of("o")))
            await until(lambda: one.desk.queued == 1)
            pool.engines.slots["r2"] = 1
            assert pool.broker is not None
            pool.broker.update(pool.engines.slots)
            await asyncio.sleep(0.1)
            assert not waiting.done()
            one.slots.update(pool.engines.view())
            assert (await waiting).replica.replica_id == "r2"

    run(scenario())


Step = Callable[[random.Random, Pool, list[Gateway]], Coroutine[Any, Any, None]]


async def _come(rng: random.Random, pool: Pool, members: list[Gateway]) -> None:
    for _ in range(rng.randrange(1, 8)):
        left_s = rng.choice([1e6, rng.uniform(0, 3)])
        call = call_of(rng.choice("abc"), priority=rng.randrange(2), left_s=left_s)
        rng.choice(members).serve(call, rng.uniform(0.01, 2), 5)


async def _leave(rng: random.Random, pool: Pool, members: list[Gateway]) -> None:
    for gateway in members:
        for call in [call for call in gateway.calls if rng.random() < 0.3]:
            call.cancel()


async def _kill(rng: random.Random, pool: Pool, members: list[Gateway]) -> None:
    index = rng.randrange(len(members))
    await members[index].kill(sockets_close_s=rng.uniform(0, 0.1))
    members[index].slots.close()
    members[index] = Gateway(f"{members[index].name}'", pool)
    members[index].connect()


async def _restart(rng: random.Random, pool: Pool, members: list[Gateway]) -> None:
    pool.kill()
    for gateway in members:
        gateway.disconnect()
    await asyncio.sleep(rng.uniform(0, 0.3))
    pool.start()
    for gateway in members:
        await asyncio.sleep(rng.uniform(0, 0.2))
        gateway.connect()


async def _break(rng: random.Random, pool: Pool, members: list[Gateway]) -> None:
    gateway = rng.choice(members)
    gateway.disconnect()
    await asyncio.sleep(rng.uniform(0, 0.5))
    gateway.connect()


async def _pause(rng: random.Random, pool: Pool, members: list[Gateway]) -> None:
    await asyncio.sleep(rng.uniform(0, 2))


STEPS: list[Step] = [_come, _come, _come, _leave, _kill, _restart, _break, _pause]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.lists(st.sampled_from(STEPS), max_size=25))
def test_whatever_happens_no_slot_is_used_twice_and_none_is_lost(seed: int, steps: list[Step]) -> None:
    async def scenario() -> None:
        rng = random.Random(seed)
        async with fleet({"r1": 3, "r2": 2}, 3) as (pool, members):
            for step in steps:
                await step(rng, pool, members)
                await asyncio.sleep(rng.uniform(0, 0.2))
            # All is served in the end, and then all is free again.
            async with asyncio.timeout(600):
                while any(gateway.calls for gateway in members):
                    await asyncio.sleep(0.5)
                await asyncio.sleep(5)
            assert pool.broker is not None
            assert pool.broker.busy == 0
            assert pool.broker.held == 5
            for gateway in members:
                with contextlib.suppress(HelixError):
                    (await gateway.slots.acquire(call_of("last"))).release()

    run(scenario())
