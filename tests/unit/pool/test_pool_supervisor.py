"""The supervisor against engines that exist only as futures: no process, no socket, no waiting."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.engines.launching import EngineCommand, EngineProperties, LaunchSpec
from helixflow.pool.catalogue import Catalogue, ModelSpec
from helixflow.pool.launcher_client import EngineExit, RunningEngine
from helixflow.pool.lifecycle import DeploymentView, State
from helixflow.pool.manifest import StoredModel
from helixflow.pool.plan import PlannedDeployment, plan_deployments
from helixflow.pool.progress import PullProgress, Report
from helixflow.pool.replica import HealthPolicy
from helixflow.pool.supervisor import Supervisor
from helixflow.process.backoff import Backoff
from helixflow.settings.deployments import Launched, LlamaCppDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.tree import Settings

MODEL = StoredModel("m", "file:/m.gguf", "a" * 64, Path("/m.gguf"), 1, "", 4096, "chat", None, 0.0)
POLICY = HealthPolicy(ready_interval_s=0, interval_s=0, deadline_s=1, failures=3)
TAIL = ("0.00.001.000 E gguf_init: invalid magic characters",)


class FakeEngines:
    def __init__(self) -> None:
        self.running: dict[str, RunningEngine] = {}
        self.started: list[RunningEngine] = []
        self.stopped: list[str] = []
        self.doomed = False

    async def start(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str], stdin: str, meta: Mapping[str, Any]
    ) -> RunningEngine:
        engine = RunningEngine(name, 100 + len(self.started), meta, asyncio.get_running_loop().create_future())
        self.started.append(engine)
        self.running[name] = engine
        if self.doomed:
            self.end(name, 1, TAIL)
        return engine

    async def stop(self, name: str, grace_s: float) -> None:
        self.stopped.append(name)
        self.end(name, -9)

    async def list(self) -> tuple[RunningEngine, ...]:
        return tuple(self.running.values())

    def end(self, name: str, status: int, tail: tuple[str, ...] = ()) -> None:
        self.running.pop(name).exited.set_result(EngineExit(status, tail))


class FakeKind:
    def __init__(self) -> None:
        self.answer: Callable[[], bool] = lambda: True
        self.properties = EngineProperties(slots=4, context=8192, supports_tools=True)

    async def is_healthy(self, port: int, key: str, deadline_s: float) -> bool:
        await asyncio.sleep(0)
        return self.answer()

    async def read_properties(self, deployment: Launched, port: int, key: str, deadline_s: float) -> EngineProperties:
        return self.properties

    async def read_activity(self, port: int, key: str, deadline_s: float) -> int:
        return 0

    def command(self, spec: LaunchSpec) -> EngineCommand:
        return EngineCommand(("engine", spec.key))


def plan(**settings: Any) -> PlannedDeployment:
    deployment = LlamaCppDeployment(engine="llama_cpp", source="file:/m.gguf", **settings)
    tree = Settings(data_dir=Path("/nowhere"), models=(ModelSettings(name="m", deployments=(deployment,)),))
    return plan_deployments(tree, Catalogue([]))[0]


class Pool:
    """A supervisor with its fakes, and waiting for what it shows."""

    def __init__(
        self, planned: PlannedDeployment, engines: FakeEngines, pull: Callable[[ModelSpec, Report], StoredModel]
    ) -> None:
        self.engines = engines
        self.probe = FakeKind()
        self.supervisor = Supervisor(
            [planned],
            engines,
            {"llama_cpp": self.probe},
            pull,
            policy=POLICY,
            make_backoff=lambda: Backoff(initial_s=0, maximum_s=0),
        )

    @property
    def view(self) -> DeploymentView:
        return self.supervisor.snapshot()[0]

    async def until(self, wanted: Callable[[DeploymentView], bool]) -> DeploymentView:
        async with asyncio.timeout(5):
            while not wanted(self.view):
                await self.supervisor.changes.wait_beyond(self.supervisor.changes.revision)
        return self.view


@asynccontextmanager
async def running(
    planned: PlannedDeployment,
    engines: FakeEngines | None = None,
    pull: Callable[[ModelSpec, Report], StoredModel] = lambda _spec, _report: MODEL,
) -> AsyncIterator[Pool]:
    pool = Pool(planned, engines or FakeEngines(), pull)
    task = asyncio.create_task(pool.supervisor.run())
    try:
        yield pool
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled(), "the supervisor failed"


def is_ready(view: DeploymentView) -> bool:
    return view.state is State.READY


def is_failed(view: DeploymentView) -> bool:
    return view.state is State.FAILED


async def test_a_deployment_that_loads_at_the_start_becomes_ready() -> None:
    async with running(plan(context=2048)) as pool:
        view = await pool.until(is_ready)
        replica = view.replicas[0].replica
        assert (view.deployment, replica.slots, replica.context, replica.supports_tools) == (
            "m/llama_cpp-0",
            4,
            2048,
            True,
        )
        assert replica.api_key not in replica.replica_id


async def test_first_use_waits_to_be_asked() -> None:
    async with running(plan(load="first_use")) as pool:
        await asyncio.sleep(0)
        assert pool.view.state is State.IDLE
        pool.supervisor.load("m/llama_cpp-0")
        await pool.until(is_ready)
        pool.supervisor.load("m/llama_cpp-0")
        assert len(pool.engines.started) == 1, "asking again starts nothing"


async def test_an_unknown_deployment_is_not_found() -> None:
    async with running(plan()) as pool:
        with pytest.raises(HelixError) as caught:
            pool.supervisor.load("other/llama_cpp-0")
        assert caught.value.kind is ErrorKind.NOT_FOUND


async def test_a_crashed_engine_is_replaced_by_another_replica() -> None:
    async with running(plan()) as pool:
        first = (await pool.until(is_ready)).replicas[0].replica
        pool.engines.end(first.replica_id, -11)
        view = await pool.until(lambda view: is_ready(view) and view.restarts == 1)
        second = view.replicas[0].replica
        assert second.replica_id != first.replica_id
        assert second.api_key != first.api_key


async def test_a_model_that_never_loads_fails_with_its_cause_and_can_be_asked_for_again() -> None:
    engines = FakeEngines()
    engines.doomed = True
    async with running(plan(), engines) as pool:
        view = await pool.until(is_failed)
        assert view.detail == "gguf_init: invalid magic characters"
        assert len(engines.started) == 5
        engines.doomed = False
        pool.supervisor.load("m/llama_cpp-0")
        await pool.until(is_ready)


async def test_a_model_that_cannot_be_pulled_fails_with_the_reason() -> None:
    def pull(_spec: ModelSpec, report: Report) -> StoredModel:
        report(PullProgress("downloading", 10, 20))
        raise UserError("no network", ExitCode.UNAVAILABLE)

    async with running(plan(), pull=pull) as pool:
        assert (await pool.until(is_failed)).detail == "no network"
        assert pool.engines.started == []


async def test_an_engine_that_hangs_is_killed_and_replaced() -> None:
    async with running(plan()) as pool:
        first = (await pool.until(is_ready)).replicas[0].replica.replica_id
        answers = iter([False, True, False, False])
        pool.probe.answer = lambda: next(answers, first not in pool.engines.running)
        await pool.until(lambda view: is_ready(view) and view.restarts == 1)
        assert pool.engines.stopped == [first]
        assert next(answers, None) is None, "two failures with a success between them were forgiven"


async def test_each_replica_has_a_seat_of_its_own() -> None:
    async with running(plan(replicas=2)) as pool:
        view = await pool.until(lambda view: len(view.replicas) == 2)
        pool.engines.end(view.replicas[0].replica.replica_id, -9)
        view = await pool.until(lambda view: len(view.replicas) == 1)
        assert view.state is State.READY
        await pool.until(lambda view: len(view.replicas) == 2)


async def test_a_successor_takes_running_engines_over() -> None:
    engines = FakeEngines()
    async with running(plan(), engines) as pool:
        before = (await pool.until(is_ready)).replicas
    assert engines.stopped == [], "engines outlive the supervisor"
    async with running(plan(), engines) as pool:
        assert (await pool.until(is_ready)).replicas == before
    assert len(engines.started) == 1


async def test_engines_of_other_settings_are_ended() -> None:
    engines = FakeEngines()
    async with running(plan(parallel=2), engines) as pool:
        old = (await pool.until(is_ready)).replicas[0].replica.replica_id
    async with running(plan(parallel=3), engines) as pool:
        await pool.until(is_ready)
    assert engines.stopped == [old]
    assert len(engines.started) == 2


async def test_watchers_see_the_latest_state_only() -> None:
    async with running(plan(load="first_use")) as pool:
        changes = pool.supervisor.changes
        seen = changes.revision
        pool.supervisor.load("m/llama_cpp-0")
        await pool.until(is_ready)
        async with asyncio.timeout(1):
            latest = await changes.wait_beyond(seen)
        assert latest > seen + 1, "several changes, one wake-up"


async def test_the_models_own_context_bounds_a_request() -> None:
    model = replace(MODEL, context=512)
    async with running(plan(context=8192), pull=lambda _spec, _report: model) as pool:
        assert (await pool.until(is_ready)).replicas[0].replica.context == 512


async def test_an_unforeseen_fault_of_one_deployment_is_its_own() -> None:
    faults = [ValueError("Cannot have -- or ..")]

    def pull(_spec: ModelSpec, _report: Report) -> StoredModel:
        if faults:
            raise faults.pop()
        return MODEL

    async with running(plan(), pull=pull) as pool:
        assert (await pool.until(is_failed)).detail == "unexpected ValueError: Cannot have -- or .."
        pool.supervisor.load("m/llama_cpp-0")
        await pool.until(is_ready)


async def test_every_seat_has_a_thread_to_wait_for_the_store_in() -> None:
    seats = 40  # more than the default executor has threads on a small machine
    together = threading.Barrier(seats)

    def pull(_spec: ModelSpec, _report: Report) -> StoredModel:
        together.wait(5)
        return MODEL

    async with running(plan(replicas=seats), pull=pull) as pool:
        view = await pool.until(lambda view: len(view.replicas) == seats)
        assert view.restarts == 0
