"""Who is probed, when, and what comes of it."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from helixflow.core.call import Call, Stream
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.routing.probes import Probes, ProbeSchedule
from helixflow.routing.target import Target
from helixflow.settings.deployments import OpenAIDeployment
from helixflow.settings.serving import RoutingSettings
from tests.harness.virtual_time import VirtualTimeLoop

INTERVAL_S = 30.0
FAILURES = 3
ROUTING = RoutingSettings(ejection_failures=FAILURES, ejection_s=10, ejection_max_s=1000)


class LoopClock(FakeClock):
    """Goes with the event loop that runs."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()


class Server:
    """Answers probes as told; never generates."""

    def __init__(self, fault: ErrorKind | None = None, takes_s: float = 0) -> None:
        self.fault = fault
        self.takes_s = takes_s
        self.probed_at: list[float] = []
        self.under_way = 0

    async def open(self, call: Call) -> Stream:
        raise AssertionError("a probe is no generation")

    async def probe(self, deadline: float) -> None:
        self.probed_at.append(asyncio.get_running_loop().time())
        self.under_way += 1
        try:
            await asyncio.sleep(self.takes_s)
        finally:
            self.under_way -= 1
        if self.fault is not None:
            raise HelixError(self.fault, "no")


class Mute:
    async def open(self, call: Call) -> Stream:
        raise AssertionError


def make_target(
    engine: Server | Mute, clock: FakeClock, *, name: str = "m/a", interval_s: float = INTERVAL_S
) -> Target:
    settings = OpenAIDeployment(engine="openai", base_url="http://127.0.0.1:1/v1", probe_interval_s=interval_s)
    return Target(name, engine, settings, routing=ROUTING, clock=clock, slots=None)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(scenario())


def eject(target: Target) -> None:
    for _ in range(FAILURES):
        target.health.fail(target.health.begin())


def test_only_the_idle_who_want_it_are_probed() -> None:
    clock = FakeClock()
    idle, busy, streaming, silent, mute = (
        make_target(Server(), clock, name="m/a"),
        make_target(Server(), clock, name="m/b"),
        make_target(Server(), clock, name="m/c"),
        make_target(Server(), clock, name="m/d", interval_s=0),
        make_target(Mute(), clock, name="m/e"),
    )
    targets = [idle, busy, streaming, silent, mute]
    streaming.in_flight = 1
    schedule = ProbeSchedule(clock)
    for _ in range(int(INTERVAL_S)):
        assert schedule.due(targets) == []
        clock.advance(1)
        busy.health.abandon(busy.health.begin())
        if schedule.due(targets) == [idle]:
            break
    else:
        raise AssertionError("the idle one was never due")
    clock.advance(10 * INTERVAL_S)
    busy.health.begin()
    assert schedule.due(targets) == [], "one at a time"
    schedule.done(idle, well=True)
    clock.advance(INTERVAL_S)
    busy.health.begin()
    assert schedule.due(targets) == [idle]


def test_an_ejected_one_is_probed_though_it_has_traffic_but_not_more_often() -> None:
    clock = FakeClock()
    target = make_target(Server(), clock)
    schedule = ProbeSchedule(clock)
    schedule.due([target])
    target.in_flight = 1
    clock.advance(INTERVAL_S)
    assert schedule.due([target]) == []
    eject(target)
    clock.advance(1)
    assert schedule.due([target]) == []
    clock.advance(INTERVAL_S)
    assert schedule.due([target]) == [target]
    schedule.done(target, well=True)
    assert not target.health.is_open, "a call may try it now"
    clock.advance(1)
    assert schedule.due([target]) == []


def test_a_probe_of_what_was_replaced_meanwhile_is_no_news() -> None:
    clock = FakeClock()
    old, new = make_target(Server(), clock), make_target(Server(), clock)
    schedule = ProbeSchedule(clock)
    schedule.due([old])
    clock.advance(INTERVAL_S)
    assert schedule.due([old]) == [old]
    schedule.due([new])
    assert not schedule.done(old, well=False)
    clock.advance(INTERVAL_S)
    assert schedule.due([new]) == [new]


def test_an_idle_one_that_died_is_found_out_soon_and_that_it_is_back_as_well() -> None:
    async def scenario() -> None:
        clock = LoopClock()
        server = Server()
        target = make_target(server, clock)
        probing = asyncio.create_task(Probes(lambda: [target], clock).run())
        await asyncio.sleep(2 * INTERVAL_S)
        assert 2 <= len(server.probed_at) <= 3
        server.fault = ErrorKind.UPSTREAM_UNAVAILABLE
        await asyncio.sleep(INTERVAL_S + 10)
        assert target.health.is_ejected
        server.fault = None
        await asyncio.sleep(INTERVAL_S)
        assert not target.health.is_open
        probing.cancel()

    run(scenario)


def test_who_limits_requests_is_there_and_who_hangs_is_not() -> None:
    async def scenario() -> None:
        clock = LoopClock()
        limiting = make_target(Server(ErrorKind.RATE_LIMITED), clock, name="m/a")
        hanging = make_target(Server(takes_s=1e6), clock, name="m/b")
        probing = asyncio.create_task(Probes(lambda: [limiting, hanging], clock).run())
        await asyncio.sleep(3 * INTERVAL_S)
        assert not limiting.health.is_ejected
        assert hanging.health.is_ejected
        probing.cancel()

    run(scenario)


def test_a_few_at_once_and_none_when_it_ends() -> None:
    async def scenario() -> None:
        clock = LoopClock()
        servers = [Server(takes_s=4) for _ in range(40)]
        targets = [make_target(server, clock, name=f"m/{n}") for n, server in enumerate(servers)]
        probing = asyncio.create_task(Probes(lambda: targets, clock).run())
        most = 0
        while not all(server.probed_at for server in servers):
            await asyncio.sleep(0.5)
            most = max(most, sum(server.under_way for server in servers))
        assert 1 < most <= 8
        probing.cancel()
        await asyncio.wait([probing])
        assert not any(server.under_way for server in servers)

    run(scenario)
