"""Memory given and taken over time, with a clock that only moves when told to."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

import pytest

from helixflow.core.clock import FakeClock
from helixflow.pool.memory import Limits, Need
from helixflow.pool.residency import NoRoomError, Residency, Room

FAR = 1e9


class FakeActivity:
    """What a test says of deployments."""

    def __init__(self) -> None:
        self.running: dict[str, int] = {}
        self.used: dict[str, float] = {}
        self.tell: Callable[[str], None] = lambda _name: None

    def busy(self, deployment: str) -> int:
        return self.running.get(deployment, 0)

    def busy_slots(self, deployment: str) -> Mapping[str, int]:
        return {}

    def last_used(self, deployment: str) -> float:
        return self.used.get(deployment, 0.0)

    def on_idle(self, callback: Callable[[str], None]) -> None:
        self.tell = callback


@dataclass
class FakeTenant:
    """Leaves when the test lets it. `idle_answers`: what its engines say, then that they are idle."""

    key: str
    is_pinned: bool = False
    is_superseded: bool = False
    is_leaving: bool = False
    is_asleep: bool = False
    keep_alive_s: float = 0.0
    idle_answers: list[bool] = field(default_factory=list)
    told: asyncio.Event = field(default_factory=asyncio.Event)
    room: Room | None = None

    @property
    def deployment(self) -> str:
        return self.key

    async def is_idle(self) -> bool:
        return self.idle_answers.pop(0) if self.idle_answers else True

    def unload(self) -> None:
        self.is_leaving = True
        self.told.set()

    def go(self) -> None:
        assert self.room is not None
        self.room.release()
        self.is_leaving = False


class Node:
    """100 bytes of memory, and who has them."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.clock.advance(1000)
        self.activity = FakeActivity()
        self.residency = Residency(lambda _given: Limits(100), self.activity, self.clock, min_residence_s=10)

    async def load(self, tenant: FakeTenant, size: int, **options: bool) -> None:
        """Returns when it has its memory and has settled in."""
        tenant.room = await self.residency.admit(tenant, Need(size), deadline=FAR, **options)
        tenant.room.settle()

    def ask(self, tenant: FakeTenant, size: int) -> "asyncio.Task[None]":
        return asyncio.create_task(self.load(tenant, size))

    async def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.residency.wake()
        await settle()


async def settle() -> None:
    """Lets everything happen that can happen by itself; reading the limits takes a thread."""
    for _ in range(5):
        await asyncio.to_thread(lambda: None)
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    node = Node()
    task = asyncio.create_task(node.residency.run())
    async with asyncio.timeout(60):
        yield node
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled(), "the residency failed"


async def test_an_idle_model_leaves_for_another_one_which_loads_when_it_is_gone(node: Node) -> None:
    a, b = FakeTenant("a"), FakeTenant("b")
    await node.load(a, 60)
    await node.advance(20)
    loading = node.ask(b, 60)
    await a.told.wait()
    await settle()
    assert not loading.done(), "its memory is not free yet"
    a.go()
    await loading
    assert (await node.residency.read_capacity())[1] == 60


async def test_its_shortest_residence_is_respected(node: Node) -> None:
    a, b = FakeTenant("a"), FakeTenant("b")
    await node.load(a, 60)
    loading = node.ask(b, 60)
    await node.advance(9)
    assert not a.told.is_set()
    await node.advance(1.1)
    assert a.told.is_set()
    a.go()
    await loading


async def test_a_busy_model_is_waited_for_and_asked_once_it_is_idle(node: Node) -> None:
    a, b = FakeTenant("a"), FakeTenant("b")
    await node.load(a, 60)
    await node.advance(20)
    node.activity.running["a"] = 1
    loading = node.ask(b, 60)
    await settle()
    assert not a.told.is_set()
    node.activity.running["a"] = 0
    node.activity.tell("a")
    await a.told.wait()
    a.go()
    await loading


async def test_an_engine_that_says_it_is_busy_stays_whatever_the_books_say(node: Node) -> None:
    a, b = FakeTenant("a", idle_answers=[False]), FakeTenant("b")
    await node.load(a, 60)
    await node.advance(20)
    loading = node.ask(b, 60)
    await settle()
    assert not a.told.is_set()
    await node.advance(0.3)
    assert a.told.is_set(), "it is asked again soon"
    a.go()
    await loading


async def test_a_loading_model_does_not_leave(node: Node) -> None:
    a, b = FakeTenant("a"), FakeTenant("b")
    a.room = await node.residency.admit(a, Need(60), deadline=FAR)
    loading = node.ask(b, 60)
    await node.advance(1000)
    assert not a.told.is_set()
    a.room.settle()
    await node.advance(11)
    assert a.told.is_set()
    a.go()
    await loading


async def test_memory_that_is_freed_for_one_is_not_given_to_another(node: Node) -> None:
    a, b, c = FakeTenant("a"), FakeTenant("b"), FakeTenant("c")
    await node.load(a, 70)
    await node.advance(20)
    first = node.ask(b, 70)
    await a.told.wait()
    second = node.ask(c, 40)
    await settle()
    a.go()
    await first
    await settle()
    assert not second.done()
    third = node.ask(FakeTenant("d"), 20)
    await third
    second.cancel()
    await asyncio.wait([second])


async def test_one_that_gives_up_frees_the_way(node: Node) -> None:
    a, b, c = FakeTenant("a"), FakeTenant("b"), FakeTenant("c")
    await node.load(a, 70)
    await node.advance(20)
    first = node.ask(b, 90)
    await a.told.wait()
    second = node.ask(c, 20)
    await settle()
    assert not second.done(), "it would be in the way"
    first.cancel()
    await second


async def test_what_never_fits_is_told_at_once(node: Node) -> None:
    with pytest.raises(NoRoomError, match="needs 101 B of RAM, the limit is 100 B") as caught:
        await node.load(FakeTenant("a"), 101)
    assert caught.value.is_final


async def test_a_load_that_nobody_asked_for_evicts_nobody(node: Node) -> None:
    a = FakeTenant("a")
    await node.load(a, 60)
    await node.advance(20)
    with pytest.raises(NoRoomError, match="no room without unloading") as caught:
        await node.load(FakeTenant("b"), 60, evict=False)
    assert not caught.value.is_final
    assert not a.told.is_set()


async def test_waiting_ends_at_the_deadline_with_the_numbers(node: Node) -> None:
    a = FakeTenant("a")
    await node.load(a, 60)
    await node.advance(20)
    node.activity.running["a"] = 1
    reasons: list[str] = []
    with pytest.raises(NoRoomError, match=r"no memory in time: .* of which 60 B busy") as caught:
        await node.residency.admit(
            FakeTenant("b"), Need(60), deadline=node.clock.monotonic() + 0.05, tell=reasons.append
        )
    assert caught.value.is_final
    assert len(reasons) == 1


async def test_a_model_leaves_after_its_time_to_live_without_use(node: Node) -> None:
    a = FakeTenant("a", keep_alive_s=300)
    await node.load(a, 60)
    await node.advance(299)
    node.activity.used["a"] = node.clock.monotonic()
    await node.advance(299)
    assert not a.told.is_set()
    node.activity.running["a"] = 1
    await node.advance(100)
    assert not a.told.is_set(), "it is used right now"
    node.activity.running["a"] = 0
    node.activity.used["a"] = node.clock.monotonic()
    await node.advance(301)
    assert a.told.is_set()


async def test_measured_memory_counts_from_then_on(node: Node) -> None:
    a = FakeTenant("a")
    await node.load(a, 60)
    assert a.room is not None
    a.room.correct(Need(20, measured=True))
    await node.load(FakeTenant("b"), 80)
