"""The supervisor against engines that exist only as futures: no process, no socket, no waiting."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helixflow.core.clock import SystemClock
from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.engines.launching import EngineCommand, EngineProperties, LaunchSpec, Settled
from helixflow.pool.activity import NoActivity
from helixflow.pool.catalogue import Catalogue, ModelSpec
from helixflow.pool.launcher_client import EngineExit, RunningEngine
from helixflow.pool.lifecycle import DeploymentView, State
from helixflow.pool.manifest import StoredModel
from helixflow.pool.memory import Limits, Need
from helixflow.pool.plan import PlannedDeployment, plan_deployments
from helixflow.pool.progress import PullProgress, Report
from helixflow.pool.replica import HealthPolicy, ModelFiles
from helixflow.pool.residency import Residency
from helixflow.pool.supervisor import Supervisor
from helixflow.process.backoff import Backoff
from helixflow.settings.deployments import Launched, LlamaCppDeployment, VllmDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.tree import Settings

MODEL = StoredModel("m", "file:/m.gguf", "a" * 64, Path("/m.gguf"), 1, "", 4096, "chat", None, 0.0)
POLICY = HealthPolicy(
    ready_interval_s=0, interval_s=0, deadline_s=1, failures=3, quiet_s=0, quiet_interval_s=0, stop_grace_s=0
)
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
        self.running = 0
        self.settled: list[Launched] = []
        self.reached: Callable[[], Settled] = Settled

    async def is_healthy(self, port: int, key: str, deadline_s: float) -> bool:
        await asyncio.sleep(0)
        return self.answer()

    async def read_properties(self, deployment: Launched, port: int, key: str, deadline_s: float) -> EngineProperties:
        return self.properties

    async def settle(self, deployment: Launched, public_name: str, port: int, key: str, deadline_s: float) -> Settled:
        self.settled.append(deployment)
        return self.reached()

    async def read_activity(self, port: int, key: str, deadline_s: float) -> int:
        await asyncio.sleep(0)
        return self.running

    def command(self, spec: LaunchSpec) -> EngineCommand:
        return EngineCommand(("engine", spec.key))


def plan(public_name: str = "m", **settings: Any) -> PlannedDeployment:
    deployment = LlamaCppDeployment(engine="llama_cpp", source="file:/m.gguf", **settings)
    tree = Settings(data_dir=Path("/nowhere"), models=(ModelSettings(name=public_name, deployments=(deployment,)),))
    return plan_deployments(tree, Catalogue([]))[0]


class SixtyEach:
    """Every replica takes 60 bytes."""

    def need(self, planned: PlannedDeployment, files: ModelFiles) -> Need:
        return Need(60)

    def note(self, planned: PlannedDeployment, digest: str, need: Need, pid: int, *, fresh: bool) -> Need:
        return need


class Pool:
    """A supervisor with its fakes, and waiting for what it shows."""

    def __init__(
        self,
        planned: Sequence[PlannedDeployment],
        engines: FakeEngines,
        pull: Callable[[ModelSpec, Report], StoredModel],
        memory: int,
    ) -> None:
        self.engines = engines
        self.probe = FakeKind()
        self.supervisor = Supervisor(
            planned,
            engines,
            {"llama_cpp": self.probe},
            pull,
            residency=Residency(lambda _given: Limits(memory), NoActivity(), SystemClock()),
            figures=SixtyEach(),
            policy=POLICY,
            make_backoff=lambda: Backoff(initial_s=0, maximum_s=0),
        )

    @property
    def view(self) -> DeploymentView:
        return self.supervisor.snapshot()[0]

    def view_of(self, name: str) -> DeploymentView:
        return next(view for view in self.supervisor.snapshot() if view.deployment == f"{name}/llama_cpp-0")

    async def until(self, wanted: Callable[[DeploymentView], bool], name: str = "m") -> DeploymentView:
        async with asyncio.timeout(60):
            while not wanted(self.view_of(name)):
                await self.supervisor.changes.wait_beyond(self.supervisor.changes.revision)
        return self.view_of(name)

    async def until_gone(self, name: str) -> None:
        async with asyncio.timeout(60):
            while any(view.deployment.startswith(f"{name}/") for view in self.supervisor.snapshot()):
                await self.supervisor.changes.wait_beyond(self.supervisor.changes.revision)


@asynccontextmanager
async def running(
    *planned: PlannedDeployment,
    engines: FakeEngines | None = None,
    pull: Callable[[ModelSpec, Report], StoredModel] = lambda _spec, _report: MODEL,
    memory: int = 1 << 40,
) -> AsyncIterator[Pool]:
    pool = Pool(planned, engines or FakeEngines(), pull, memory)
    task = asyncio.create_task(pool.supervisor.run())
    try:
        async with asyncio.timeout(60):
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
    async with running(plan(), engines=engines) as pool:
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
    async with running(plan(), engines=engines) as pool:
        before = (await pool.until(is_ready)).replicas
    assert engines.stopped == [], "engines outlive the supervisor"
    async with running(plan(), engines=engines) as pool:
        assert (await pool.until(is_ready)).replicas == before
    assert len(engines.started) == 1


async def test_engines_of_other_settings_are_ended() -> None:
    engines = FakeEngines()
    async with running(plan(parallel=2), engines=engines) as pool:
        old = (await pool.until(is_ready)).replicas[0].replica.replica_id
    async with running(plan(parallel=3), engines=engines) as pool:
        await pool.until(is_ready)
    assert engines.stopped == [old]
    assert len(engines.started) == 2


async def test_watchers_see_the_latest_state_only() -> None:
    async with running(plan(load="first_use")) as pool:
        changes = pool.supervisor.changes
        seen = changes.revision
        pool.supervisor.load("m/llama_cpp-0")
        await pool.until(is_ready)
        async with asyncio.timeout(60):
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


async def test_replicas_of_one_model_share_its_pull() -> None:
    pulls: list[ModelSpec] = []

    def pull(spec: ModelSpec, _report: Report) -> StoredModel:
        pulls.append(spec)
        return MODEL

    async with running(plan(replicas=5), pull=pull) as pool:
        await pool.until(lambda view: len(view.replicas) == 5)
    assert len(pulls) == 1


async def test_every_model_has_a_thread_to_wait_for_the_store_in() -> None:
    models = 40  # more than the default executor has threads on a small machine
    together = threading.Barrier(models)

    def pull(_spec: ModelSpec, _report: Report) -> StoredModel:
        together.wait(60)
        return MODEL

    async with running(*(plan(f"m{index}") for index in range(models)), pull=pull) as pool:
        for index in range(models):
            await pool.until(is_ready, f"m{index}")


def is_idle(view: DeploymentView) -> bool:
    return view.state is State.IDLE


async def test_unloading_ends_engines_once_they_do_nothing_and_hides_them_at_once() -> None:
    async with running(plan(replicas=2)) as pool:
        await pool.until(lambda view: len(view.replicas) == 2)
        pool.probe.running = 1
        unloading = asyncio.create_task(pool.supervisor.unload("m/llama_cpp-0", 60))
        view = await pool.until(lambda view: view.state is State.UNLOADING)
        assert (len(view.replicas), len(view.closing)) == (0, 2)
        assert pool.engines.stopped == []
        pool.probe.running = 0
        await unloading
        assert is_idle(pool.view)
        assert len(pool.engines.stopped) == 2
        pool.supervisor.load("m/llama_cpp-0")
        await pool.until(is_ready)


async def test_a_generation_that_does_not_end_is_cut_off_after_the_grace() -> None:
    async with running(plan()) as pool:
        await pool.until(is_ready)
        pool.probe.running = 1
        await pool.supervisor.unload("m/llama_cpp-0", 0.05)
        assert is_idle(pool.view)


async def test_a_request_that_comes_while_a_model_leaves_brings_it_back() -> None:
    async with running(plan()) as pool:
        await pool.until(is_ready)
        unloading = asyncio.create_task(pool.supervisor.unload("m/llama_cpp-0", 60))
        await pool.until(lambda view: view.state is State.UNLOADING)
        pool.supervisor.load("m/llama_cpp-0")
        await unloading
        await pool.until(is_ready)


async def test_unloading_ends_what_is_loading_or_waiting_too() -> None:
    release = threading.Event()

    def pull(_spec: ModelSpec, _report: Report) -> StoredModel:
        release.wait(60)
        return MODEL

    async with running(plan("slow"), plan("m"), pull=lambda spec, report: pull(spec, report)) as pool:
        await pool.until(lambda view: view.state is State.PULLING, "slow")
        await pool.supervisor.unload("slow/llama_cpp-0", 60)
        assert pool.view_of("slow").state is State.IDLE
        release.set()
        await pool.until(is_ready)
        pool.probe.answer = lambda: False
        pool.supervisor.load("slow/llama_cpp-0")
        await pool.until(lambda view: view.state is State.LOADING, "slow")
        await pool.supervisor.unload("slow/llama_cpp-0", 60)
        assert pool.view_of("slow").state is State.IDLE


async def test_models_that_do_not_fit_together_take_turns() -> None:
    async with running(plan("a", load="first_use"), plan("b", load="first_use"), memory=100) as pool:
        for name, other in (("a", "b"), ("b", "a"), ("a", "b")):
            await pool.supervisor.load_and_wait(f"{name}/llama_cpp-0")
            assert (pool.view_of(name).state, pool.view_of(other).state) == (State.READY, State.IDLE)
            assert len(pool.engines.running) == 1


async def test_a_pinned_model_stays_and_the_other_is_refused_with_the_numbers() -> None:
    async with running(plan("a", load="first_use"), plan("b", load="first_use"), memory=100) as pool:
        await pool.supervisor.load_and_wait("a/llama_cpp-0")
        pool.supervisor.pin("a/llama_cpp-0", True)
        with pytest.raises(HelixError, match="needs 60 B of RAM, the limit is 100 B, of which 60 B pinned") as caught:
            await pool.supervisor.load_and_wait("b/llama_cpp-0")
        assert caught.value.kind is ErrorKind.OVERLOADED
        assert pool.view_of("a").pinned
        pool.supervisor.pin("a/llama_cpp-0", False)
        await pool.supervisor.load_and_wait("b/llama_cpp-0")


async def test_a_model_that_starts_with_the_node_evicts_nobody() -> None:
    async with running(plan("a"), plan("b"), memory=100) as pool:
        await pool.until(is_ready, "a")
        view = await pool.until(lambda view: "no room" in view.detail, "b")
        assert view.state is State.IDLE, "it is loaded when somebody wants it"
        pool.supervisor.load("b/llama_cpp-0")
        await pool.until(is_ready, "b")
        assert pool.view_of("a").state is State.IDLE


async def test_adopted_engines_have_the_memory_they_had() -> None:
    engines = FakeEngines()
    async with running(plan("a"), plan("b", load="first_use"), engines=engines, memory=100) as pool:
        await pool.until(is_ready, "a")
    async with running(plan("a"), plan("b", load="first_use"), engines=engines, memory=100) as pool:
        await pool.until(is_ready, "a")
        await pool.supervisor.load_and_wait("b/llama_cpp-0")
        assert pool.view_of("a").state is State.IDLE


async def test_scaling() -> None:
    async with running(plan()) as pool:
        await pool.until(is_ready)
        pool.supervisor.scale("m/llama_cpp-0", 3)
        view = await pool.until(lambda view: len(view.replicas) == 3)
        assert view.wanted_replicas == 3
        pool.supervisor.scale("m/llama_cpp-0", 1)
        await pool.until(lambda view: len(view.replicas) == 1 and not view.closing)
        pool.supervisor.scale("m/llama_cpp-0", 0)
        assert "scaled to 0" in (await pool.until(is_failed)).detail
        with pytest.raises(HelixError, match="scaled to 0"):
            pool.supervisor.load("m/llama_cpp-0")
        pool.supervisor.scale("m/llama_cpp-0", 2)
        assert is_idle(await pool.until(lambda view: not is_failed(view)))
        pool.supervisor.load("m/llama_cpp-0")
        await pool.until(lambda view: len(view.replicas) == 2)


async def test_a_drained_pool_loads_nothing_and_says_what_still_runs() -> None:
    async with running(plan("m"), plan("other", load="first_use")) as pool:
        await pool.until(is_ready)
        pool.probe.running = 2
        assert await pool.supervisor.drain(0) == 2
        with pytest.raises(HelixError, match="drained") as caught:
            pool.supervisor.load("other/llama_cpp-0")
        assert caught.value.kind is ErrorKind.SHUTTING_DOWN
        draining = asyncio.create_task(pool.supervisor.drain(60))
        await asyncio.sleep(0)
        pool.probe.running = 0
        assert await draining == 0
        assert is_ready(pool.view), "its engines stay loaded"
        pool.supervisor.resume()
        await pool.supervisor.load_and_wait("other/llama_cpp-0")


async def test_settings_that_engines_do_not_depend_on_restart_nothing() -> None:
    async with running(plan()) as pool:
        before = (await pool.until(is_ready)).replicas
        pool.supervisor.scale("m/llama_cpp-0", 2)
        await pool.until(lambda view: len(view.replicas) == 2)
        pool.supervisor.apply([plan(weight=3, keep_alive_s=9, pinned=True, max_queue=1)])
        view = await pool.until(lambda view: len(view.replicas) == 1 and not view.closing)
        assert view.replicas == before
        assert (view.pinned, view.wanted_replicas) == (True, 1), "what was asked for at run time is over"
        pool.supervisor.apply([plan(replicas=2)])
        view = await pool.until(lambda view: len(view.replicas) == 2)
        assert before[0] in view.replicas


async def test_a_running_engine_takes_over_what_it_can_and_says_what_it_could_not() -> None:
    async with running(plan()) as pool:
        await pool.until(is_ready)
        pool.probe.reached = lambda: Settled(("m:a",))
        pool.supervisor.apply([plan(pinned=True)])
        view = await pool.until(lambda view: view.replicas[0].replica.adapters == ("m:a",))
        assert pool.probe.settled[-1].pinned, "as the settings are now"
        assert view.detail == ""
        pool.probe.reached = lambda: Settled(("m:a",), "the adapter 'm:b' could not be loaded")
        pool.supervisor.apply([plan()])
        view = await pool.until(lambda view: view.detail != "")
        assert (view.state, view.detail) == (State.READY, "the adapter 'm:b' could not be loaded")
        assert (len(view.replicas), len(pool.engines.started)) == (1, 1)


async def test_changed_engines_take_over_from_the_old_ones_without_a_gap() -> None:
    async with running(plan(parallel=2)) as pool:
        old = (await pool.until(is_ready)).replicas
        serving = asyncio.Event()
        pool.probe.answer = lambda: serving.is_set() or len(pool.engines.started) == 1
        pool.supervisor.apply([plan(parallel=3)])
        while len(pool.engines.started) == 1:
            await asyncio.sleep(0)
        assert pool.view.replicas == old
        assert is_ready(pool.view)
        serving.set()
        view = await pool.until(lambda view: view.replicas != old and len(view.replicas) == 1)
        assert is_ready(view)
        while len(pool.engines.running) > 1:
            await asyncio.sleep(0)
        assert [old[0].replica.replica_id] == pool.engines.stopped


async def test_without_memory_for_both_the_old_engine_ends_first() -> None:
    async with running(plan(parallel=2, pinned=True), memory=100) as pool:
        old = (await pool.until(is_ready)).replicas
        pool.supervisor.apply([plan(parallel=3, pinned=True)])
        view = await pool.until(lambda view: is_ready(view) and view.replicas != old)
        assert len(view.replicas) == 1
        assert len(pool.engines.running) == 1


async def test_new_settings_that_do_not_work_leave_the_old_engine_serving() -> None:
    async with running(plan(parallel=2)) as pool:
        old = (await pool.until(is_ready)).replicas
        pool.engines.doomed = True
        pool.supervisor.apply([plan(parallel=3)])
        view = await pool.until(lambda view: "invalid magic" in view.detail)
        assert view.replicas == old
        assert is_ready(view)
        pool.engines.doomed = False
        serving = asyncio.Event()
        pool.probe.answer = lambda: serving.is_set() or len(pool.engines.running) == 1
        pool.supervisor.apply([plan(parallel=4, load="first_use")])
        while len(pool.engines.running) == 1:
            await asyncio.sleep(0)
        assert pool.view.replicas == old, "it serves until what mends the mistake does"
        serving.set()
        view = await pool.until(lambda view: view.replicas != old and len(view.replicas) == 1)
        assert is_ready(view)
        assert not view.detail


async def test_what_is_no_longer_configured_ends_and_what_is_new_begins() -> None:
    async with running(plan("old")) as pool:
        await pool.until(is_ready, "old")
        pool.probe.running = 1
        pool.supervisor.apply([plan("new")])
        await pool.until(is_ready, "new")
        view = pool.view_of("old")
        assert (view.state, view.replicas, len(view.closing)) == (State.UNLOADING, (), 1)
        pool.probe.running = 0
        await pool.until_gone("old")
        assert len(pool.engines.running) == 1


async def test_settings_that_this_node_cannot_run_change_nothing() -> None:
    async with running(plan()) as pool:
        before = (await pool.until(is_ready)).replicas
        vllm = VllmDeployment(engine="vllm", model="/nowhere")
        with pytest.raises(UserError, match="no engine 'vllm'"):
            pool.supervisor.apply([PlannedDeployment("v/vllm-0", "v", vllm, None)])
        assert pool.view.replicas == before
