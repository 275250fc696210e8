import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.pki.names import replica_server_name
from helixflow.pool.data_routes import DataRoutes
from helixflow.pool.launcher_client import EngineExit, RunningEngine
from tests.harness.virtual_time import VirtualTimeLoop

DOMAIN = "helixflow.internal"


class Launcher:
    """What runs, and how often it was asked."""

    def __init__(self) -> None:
        self.engines: dict[str, RunningEngine] = {}
        self.asked = 0

    def add(self, name: str, **meta: Any) -> RunningEngine:
        exited: asyncio.Future[EngineExit] = asyncio.get_running_loop().create_future()
        self.engines[name] = RunningEngine(name, 1, meta, exited)
        return self.engines[name]

    def end(self, name: str) -> None:
        self.engines.pop(name).exited.set_result(EngineExit(0, ()))

    async def list(self) -> tuple[RunningEngine, ...]:
        self.asked += 1
        await asyncio.sleep(0.001)
        return tuple(self.engines.values())

    async def start(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str], stdin: str, meta: Mapping[str, Any]
    ) -> RunningEngine:
        raise AssertionError("the relay starts nothing")

    async def stop(self, name: str, grace_s: float) -> None:
        raise AssertionError("the relay ends nothing")


def run(scenario: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(scenario)


def named(replica: str) -> str:
    return replica_server_name(DOMAIN, replica)


def test_an_engine_is_found_once_it_runs_and_not_after_its_end() -> None:
    async def scenario() -> None:
        launcher = Launcher()
        routes = DataRoutes(launcher, DOMAIN)
        assert await routes.find(named("a")) is None
        launcher.add("a", port=4000)
        launcher.add("b", port=4001)
        assert [await routes.find(named(name)) for name in "ab"] == [4000, 4001]
        asked = launcher.asked
        assert await routes.find(named("a")) == 4000
        assert launcher.asked == asked, "what is known is not asked for"
        launcher.end("a")
        await asyncio.sleep(0)
        assert await routes.find(named("a")) is None
        assert await routes.find(named("b")) == 4001

    run(scenario())


def test_many_who_ask_for_nothing_are_one_question_now_and_then() -> None:
    async def scenario() -> None:
        launcher = Launcher()
        routes = DataRoutes(launcher, DOMAIN)
        for _ in range(5):
            found = await asyncio.gather(*(routes.find(named(f"x{number}")) for number in range(100)))
            assert set(found) == {None}
        assert launcher.asked == 5
        assert asyncio.get_running_loop().time() >= 0.4

    run(scenario())


@pytest.mark.parametrize("meta", [{}, {"port": "4000"}, {"port": None}])
def test_an_engine_without_a_port_is_none(meta: dict[str, Any]) -> None:
    async def scenario() -> None:
        launcher = Launcher()
        launcher.add("a", **meta)
        assert await DataRoutes(launcher, DOMAIN).find(named("a")) is None

    run(scenario())


def test_with_the_launcher_everything_is_lost() -> None:
    async def scenario() -> None:
        launcher = Launcher()
        engines = [launcher.add(name, port=port) for name, port in (("a", 4000), ("b", 4001))]
        routes = DataRoutes(launcher, DOMAIN)
        assert await routes.find(named("a")) == 4000
        launcher.engines.clear()
        engines[0].exited.set_exception(HelixError(ErrorKind.UNAVAILABLE, "The launcher cannot be reached."))
        await asyncio.sleep(0)
        assert await routes.find(named("b")) is None

    run(scenario())
