"""A thousand replicas in virtual time: load is level, the slow and the broken are spared, nothing swings."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from statistics import mean, pstdev
from typing import Any

import pytest

from helixflow.core.call import Call, Hints, Stream
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.routing.retry_budget import RetryBudget
from helixflow.routing.router import Router
from helixflow.routing.table import build_table
from helixflow.routing.target import Target
from helixflow.settings.models import ModelSettings
from helixflow.settings.serving import RoutingSettings
from tests.harness.routing import make_balancer, make_call, provider
from tests.harness.virtual_time import VirtualTimeLoop

REPLICAS = 1000
CAPACITY = 4
ROUTING = RoutingSettings()


class LoopClock:
    """The loop's time as a clock."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def now(self) -> float:
        return self.monotonic()


class Replica:
    """Answers after `first_s` and goes on for `service_s`; or fails at once."""

    def __init__(self, name: str, *, slowness: float = 1.0, fails: bool = False) -> None:
        self.name = name
        self.slowness = slowness
        self.fails = fails
        self.calls = 0
        self.most = 0

    async def open(self, call: Call) -> Stream:
        self.calls += 1
        if self.fails:
            raise HelixError(ErrorKind.UPSTREAM_UNAVAILABLE, "no")
        await asyncio.sleep(0.1 * self.slowness)
        return Endless()


class Endless:
    async def read(self) -> bytes:
        return b""

    def close(self) -> None:
        pass


class Fleet:
    """A model on many replicas, each a deployment, and calls that come in at random."""

    def __init__(self, replicas: Iterable[Replica], *, weights: Callable[[int], float] = lambda n: 1.0) -> None:
        self.clock = LoopClock()
        self.random = random.Random(4)
        self.weights = weights
        self.replicas: dict[str, Replica] = {}
        self.targets: dict[str, Target] = {}
        self.failed = 0
        self.served: list[tuple[Call, str]] = []
        self.spread: list[float] = []
        self.add(replicas)
        self.router = Router(
            self.table(),
            balancer=make_balancer(ROUTING, self.clock),
            retries=RetryBudget(ROUTING, self.clock),
            clock=self.clock,
        )

    def add(self, replicas: Iterable[Replica]) -> None:
        for replica in replicas:
            weight = self.weights(len(self.replicas))
            deployment = provider(replica.name, max_concurrency=CAPACITY * 100, weight=weight)
            self.replicas[f"m/{replica.name}"] = replica
            self.targets[f"m/{replica.name}"] = target = Target(
                f"m/{replica.name}", replica, deployment, routing=ROUTING, clock=self.clock, slots=None
            )
            target.capacity = CAPACITY

    def table(self) -> Any:
        deployments = tuple(
            target.settings.model_copy(update={"name": name.removeprefix("m/")})
            for name, target in self.targets.items()
        )
        return build_table([ModelSettings.model_construct(**_model(deployments))], self.targets, created=0)

    async def load(self, calls: Iterable[Call], *, utilisation: float, service_s: float = 1.0) -> None:
        """Serves them, as many a second as keep that part of all slots busy."""
        rate = utilisation * CAPACITY * len(self.targets) / (service_s + 0.1)
        async with asyncio.TaskGroup() as tasks:
            for number, call in enumerate(calls):
                tasks.create_task(self._serve(call, service_s))
                await asyncio.sleep(self.random.expovariate(rate))
                if number % 250 == 249:
                    self.spread.append(pstdev(target.in_flight for target in self.targets.values()))

    async def _serve(self, call: Call, service_s: float) -> None:
        try:
            stream = await self.router.open(call)
        except HelixError:
            self.failed += 1
            return
        name = call.progress.deployment
        self.served.append((call, name))
        replica = self.replicas[name]
        replica.most = max(replica.most, self.targets[name].in_flight if name in self.targets else 0)
        await asyncio.sleep(service_s * replica.slowness * self.random.uniform(0.5, 1.5))
        call.progress.complete = True
        stream.close()


def _model(deployments: tuple[Any, ...]) -> dict[str, Any]:
    """As validated: a thousand deployments are not validated again for each table."""
    return ModelSettings(name="m").model_dump() | {"deployments": deployments}


def replicas(count: int = REPLICAS, **settings: Any) -> list[Replica]:
    return [Replica(f"r{n}", **settings) for n in range(count)]


def run(scenario: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(scenario)


def calls(count: int) -> Iterable[Call]:
    return (make_call() for _ in range(count))


def test_load_is_level_and_stays_so() -> None:
    async def scenario() -> None:
        fleet = Fleet(replicas())
        await fleet.load(calls(6000), utilisation=0.6)
        counted = [replica.calls for replica in fleet.replicas.values()]
        assert fleet.failed == 0
        assert max(counted) < 2 * mean(counted)
        assert max(replica.most for replica in fleet.replicas.values()) <= CAPACITY + 2
        later = fleet.spread[-10:]
        assert max(later) < 1.3 * mean(later), "it does not swing"

    run(scenario())


def test_slow_replicas_get_less_and_are_not_starved() -> None:
    async def scenario() -> None:
        fleet = Fleet([Replica(f"r{n}", slowness=8 if n % 10 == 0 else 1) for n in range(REPLICAS)])
        await fleet.load(calls(6000), utilisation=0.4)
        slow = [replica for replica in fleet.replicas.values() if replica.slowness > 1]
        share = sum(replica.calls for replica in slow) / 6000
        assert 0.005 < share < 0.05, "they are a tenth of all"
        assert max(replica.most for replica in slow) <= CAPACITY + 1

    run(scenario())


def test_broken_replicas_are_found_out_by_few_calls_and_clients_hardly_notice() -> None:
    async def scenario() -> None:
        fleet = Fleet([Replica(f"r{n}", fails=n % 20 == 0) for n in range(REPLICAS)])
        await fleet.load(calls(6000), utilisation=0.5)
        broken = [replica for replica in fleet.replicas.values() if replica.fails]
        # Answering at once, they look idle: without ejection they would get most of all calls.
        assert sum(replica.calls for replica in broken) < 0.06 * 6000
        assert fleet.failed == 0

    run(scenario())


def test_newcomers_are_not_flooded_and_who_leaves_ends_what_it_has() -> None:
    async def scenario() -> None:
        fleet = Fleet(replicas())
        rounds = 6
        for number in range(rounds):
            await asyncio.gather(fleet.load(calls(500), utilisation=0.6), change(fleet, number))
        assert len(fleet.served) == rounds * 500
        new = [replica for name, replica in fleet.replicas.items() if "new" in name]
        assert max(replica.most for replica in new) <= CAPACITY + 1
        assert mean(replica.calls for replica in new[:50]) > 1

    async def change(fleet: Fleet, number: int) -> None:
        await asyncio.sleep(0.05)
        for name in list(fleet.targets)[:50]:
            del fleet.targets[name]
        fleet.add(Replica(f"new-{number}-{n}") for n in range(50))
        fleet.router.replace(fleet.table())

    run(scenario())


def test_conversations_return_to_where_they_were_and_load_stays_level() -> None:
    prompts = [f"Conversation {n}. " + "What was said before. " * 60 for n in range(1000)]

    def conversing() -> Iterable[Call]:
        chance = random.Random(3)
        return (make_call(prompt=chance.choice(prompts)) for _ in range(5000))

    async def scenario() -> None:
        fleet = Fleet(replicas(300))
        await fleet.load(conversing(), utilisation=0.5)
        assert hits(fleet.served, lambda call: bytes(call.fields["messages"])) > 0.8
        counted = [replica.calls for replica in fleet.replicas.values()]
        assert max(counted) < 2 * mean(counted)

    run(scenario())


def test_sessions_stay_while_replicas_come_and_go() -> None:
    def sessions() -> Iterable[Call]:
        chance = random.Random(3)
        return (make_call(hints=Hints(session=f"s{chance.randrange(500)}")) for _ in range(2500))

    async def scenario() -> None:
        fleet = Fleet(replicas(300))
        await fleet.load(sessions(), utilisation=0.4)
        for name in list(fleet.targets)[:30]:
            del fleet.targets[name]
        fleet.router.replace(fleet.table())
        await fleet.load(sessions(), utilisation=0.4)
        assert hits(fleet.served, lambda call: call.hints.session) > 0.75

    run(scenario())


def hits(served: list[tuple[Call, str]], key: Callable[[Call], Any]) -> float:
    """The part of those that came again which went where the last one had gone."""
    last: dict[Any, str] = {}
    returned = stayed = 0
    for call, name in served:
        if (before := last.get(key(call))) is not None:
            returned += 1
            stayed += before == name
        last[key(call)] = name
    return stayed / returned


@pytest.mark.parametrize("utilisation", [0.1, 0.7])
def test_weights_are_kept_within_a_tenth(utilisation: float) -> None:
    async def scenario() -> None:
        fleet = Fleet(replicas(4), weights=lambda n: (60, 30, 9, 1)[n])
        for target, weight in zip(fleet.targets.values(), (60, 30, 9, 1), strict=True):
            target.capacity = weight
        await fleet.load(calls(5000), utilisation=utilisation * 100 / 4 / CAPACITY)
        counted = Counter(name for _, name in fleet.served)
        for number, share in enumerate((0.6, 0.3, 0.09)):
            assert abs(counted[f"m/r{number}"] / 5000 - share) < 0.1 * share + 0.01

    run(scenario())
