"""Engines that sleep instead of ending, in a supervisor whose node has one GPU that only one of them fits on."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from helixflow.core.clock import SystemClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.pool.activity import NoActivity
from helixflow.pool.lifecycle import DeploymentView, State
from helixflow.pool.memory import Limits, Need
from helixflow.pool.plan import PlannedDeployment
from helixflow.pool.replica import ModelFiles
from helixflow.pool.residency import Residency
from helixflow.pool.supervisor import Supervisor
from helixflow.process.backoff import Backoff
from helixflow.settings.deployments import Launched
from tests.unit.pool.test_pool_supervisor import MODEL, POLICY, FakeEngines, FakeKind, plan

RAM, GPU = 60, 100


class SleepyKind(FakeKind):
    """Its engines sleep by their ports. `stubborn`: they do not wake up."""

    def __init__(self) -> None:
        super().__init__()
        self.asleep: set[int] = set()
        self.stubborn = False

    def can_sleep(self, deployment: Launched) -> bool:
        return deployment.region != "sleepless"

    async def sleep(self, port: int, key: str) -> None:
        self.asleep.add(port)

    async def wake(self, port: int, key: str) -> None:
        if self.stubborn:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "It does not wake up.")
        self.asleep.discard(port)

    async def is_asleep(self, port: int, key: str, deadline_s: float) -> bool:
        return port in self.asleep


class TheWholeGpu:
    """Every replica takes the GPU and 60 bytes of RAM."""

    def need(self, planned: PlannedDeployment, files: ModelFiles) -> Need:
        return Need(RAM, gpu_bytes=GPU)

    def note(self, planned: PlannedDeployment, digest: str, need: Need, pid: int, *, fresh: bool) -> Need:
        return need


class Pool:
    def __init__(self, planned: Sequence[PlannedDeployment], engines: FakeEngines, kind: SleepyKind, ram: int) -> None:
        self.engines = engines
        self.kind = kind
        limits = Limits(ram, {"G": GPU}, {"G": GPU})
        self.supervisor = Supervisor(
            planned,
            engines,
            {"llama_cpp": kind},
            lambda _spec, _report: MODEL,
            residency=Residency(lambda _given: limits, NoActivity(), SystemClock()),
            figures=TheWholeGpu(),
            policy=POLICY,
            make_backoff=lambda: Backoff(initial_s=0, maximum_s=0),
        )

    def view(self, name: str) -> DeploymentView:
        return next(view for view in self.supervisor.snapshot() if view.deployment == f"{name}/llama_cpp-0")

    async def load(self, name: str) -> str:
        """The replica that serves."""
        await self.supervisor.load_and_wait(f"{name}/llama_cpp-0")
        return self.view(name).replicas[0].replica.replica_id

    async def until(self, name: str, state: State, detail: str) -> None:
        async with asyncio.timeout(60):
            while ((view := self.view(name)).state, view.detail) != (state, detail):
                await self.supervisor.changes.wait_beyond(self.supervisor.changes.revision)

    async def until_running(self, *wanted: str) -> None:
        async with asyncio.timeout(60):
            while set(self.engines.running) != set(wanted):
                await self.supervisor.changes.wait_beyond(self.supervisor.changes.revision)


@asynccontextmanager
async def running(
    *names: str, engines: FakeEngines | None = None, kind: SleepyKind | None = None, ram: int = 1000, **options: Any
) -> AsyncIterator[Pool]:
    planned = [plan(name, load="first_use", **options) for name in names]
    pool = Pool(planned, engines or FakeEngines(), kind or SleepyKind(), ram)
    task = asyncio.create_task(pool.supervisor.run())
    try:
        async with asyncio.timeout(60):
            yield pool
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled(), "the supervisor failed"


async def test_models_that_sleep_take_turns_on_a_gpu_without_being_loaded_again() -> None:
    async with running("a", "b") as pool:
        first = [await pool.load("a"), await pool.load("b")]
        await pool.until("a", State.IDLE, "asleep")
        assert [await pool.load("a"), await pool.load("b"), await pool.load("a")] == [first[0], first[1], first[0]]
        await pool.until("b", State.IDLE, "asleep")
        assert (len(pool.engines.started), pool.engines.stopped) == (2, [])


async def test_one_that_was_not_used_sleeps_and_goes_on_sleeping() -> None:
    async with running("a", keep_alive_s=0.01) as pool:
        replica = await pool.load("a")
        await pool.until("a", State.IDLE, "asleep")
        pool.supervisor.pin("a/llama_cpp-0", False)  # everybody's time is looked at again
        for _ in range(20):
            await asyncio.sleep(0)
        assert (pool.engines.stopped, await pool.load("a")) == ([], replica)


async def test_what_cannot_sleep_ends() -> None:
    async with running("a", region="sleepless", keep_alive_s=0.01) as pool:
        replica = await pool.load("a")
        await pool.until("a", State.IDLE, "")
        assert pool.engines.stopped == [replica]


async def test_without_ram_for_its_weights_it_ends() -> None:
    async with running("a", "b", ram=RAM + GPU - 1) as pool:
        replica = await pool.load("a")
        await pool.load("b")
        assert (pool.engines.stopped, pool.kind.asleep) == ([replica], set())


async def test_those_that_sleep_end_when_ram_is_short() -> None:
    async with running("a", "b", ram=RAM + GPU) as pool:
        replica = await pool.load("a")
        await pool.load("b")
        assert pool.engines.stopped == [replica], "asleep it left no room for another one"
        assert pool.kind.asleep
        await pool.until("a", State.IDLE, "")


async def test_a_successor_knows_who_sleeps() -> None:
    engines, kind = FakeEngines(), SleepyKind()
    async with running("a", "b", engines=engines, kind=kind) as pool:
        first = [await pool.load("a"), await pool.load("b")]
    async with running("a", "b", engines=engines, kind=kind) as pool:
        await pool.until("a", State.IDLE, "asleep")
        await pool.until("b", State.READY, "")
        assert [await pool.load("a"), await pool.load("b")] == first


async def test_one_that_does_not_wake_up_is_replaced() -> None:
    async with running("a", keep_alive_s=0.01) as pool:
        replica = await pool.load("a")
        await pool.until("a", State.IDLE, "asleep")
        pool.kind.stubborn = True
        assert await pool.load("a") != replica
        assert pool.engines.stopped[0] == replica


async def test_one_that_dies_in_its_sleep_is_loaded_again_when_it_is_wanted() -> None:
    async with running("a", keep_alive_s=0.01) as pool:
        replica = await pool.load("a")
        await pool.until("a", State.IDLE, "asleep")
        pool.engines.end(replica, -9)
        await pool.until("a", State.IDLE, "")
        assert await pool.load("a") != replica


@pytest.mark.parametrize("how", ["drain", "unload", "scale", "apply"])
async def test_nobody_sleeps_who_is_to_go(how: str) -> None:
    async with running("a", "b") as pool:
        await pool.load("a")
        other = await pool.load("b")
        await pool.until("a", State.IDLE, "asleep")
        match how:
            case "drain":
                await pool.supervisor.drain(0)
            case "unload":
                await pool.supervisor.unload("a/llama_cpp-0", 1)
            case "scale":
                pool.supervisor.scale("a/llama_cpp-0", 0)
            case _:
                pool.supervisor.apply([plan("b", load="first_use")])
        await pool.until_running(other)
