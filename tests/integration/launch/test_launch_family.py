"""An engine that starts processes of its own (a stand-in for vLLM), in the hands of a real launcher and a real pool."""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from helixflow.core.errors import UserError
from helixflow.pool.device_cleanup import MARK, DeviceCleaner, MarkedEngines, our_processes
from helixflow.pool.devices import DeviceProcess
from helixflow.pool.launcher_client import LauncherClient
from helixflow.pool.lifecycle import State
from helixflow.pool.service import create_pool
from helixflow.settings.deployments import VllmDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.serving import PoolSettings
from helixflow.settings.tree import Settings
from tests.harness.fake_vllm import write_python
from tests.harness.node import is_alive
from tests.integration.launch.conftest import WAIT_S, Running, until

NAME = "m/vllm-0"
# Ours, vLLM's own, its core, the core's worker.
PROCESSES = 4


@pytest.fixture
def deployment(tmp_path: Path) -> VllmDeployment:
    return VllmDeployment(engine="vllm", model="org/m", python=write_python(tmp_path), context=256, load="first_use")


class Pool:
    """The pool on a launcher, loaded."""

    def __init__(self, launcher: Running, *deployments: VllmDeployment) -> None:
        models = (ModelSettings(name="m", deployments=deployments),)
        pool = PoolSettings(memory_bytes=1 << 40)
        self.settings = Settings(data_dir=launcher.folder, models=models, pool=pool)
        self._launcher = launcher

    async def __aenter__(self) -> "Pool":
        self._engines = await LauncherClient.connect(self._launcher.socket_path)
        self.services = create_pool(self.settings, self._engines)
        self._task = asyncio.create_task(self.services.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await self.services.close()
        await self._engines.close()

    async def load(self) -> list[psutil.Process]:
        """All processes of the replica."""
        async with asyncio.timeout(WAIT_S):
            await self.services.supervisor.load_and_wait(NAME)
        (view,) = self.services.supervisor.snapshot()
        assert view.state is State.READY
        root = psutil.Process(view.replicas[0].pid)
        return until(lambda: (family := [root, *root.children(recursive=True)])[PROCESSES - 1 :] and family)


def all_gone(family: list[psutil.Process]) -> bool:
    return not any(is_alive(one) for one in family)


async def test_it_serves_and_ends_with_all_of_its_processes(launcher: Running, deployment: VllmDeployment) -> None:
    async with Pool(launcher, deployment) as pool:
        family = await pool.load()
        (view,) = pool.services.supervisor.snapshot()
        assert (view.replicas[0].replica.slots, view.replicas[0].replica.context) == (deployment.parallel, 256)
        async with asyncio.timeout(WAIT_S):
            await pool.services.supervisor.unload(NAME, 1)
        await asyncio.to_thread(until, lambda: all_gone(family))


@pytest.mark.parametrize("victim", range(2))
async def test_a_killed_one_leaves_nothing_and_is_replaced(
    launcher: Running, deployment: VllmDeployment, victim: int
) -> None:
    async with Pool(launcher, deployment) as pool:
        family = await pool.load()
        family[victim].kill()
        await asyncio.to_thread(until, lambda: all_gone(family))
        changes = pool.services.supervisor.changes
        async with asyncio.timeout(WAIT_S):
            while not any(one.replicas and one.restarts for one in pool.services.supervisor.snapshot()):
                await changes.wait_beyond(changes.revision)
        (view,) = pool.services.supervisor.snapshot()
        assert view.restarts == 1


async def test_a_killed_launcher_leaves_nothing(launcher: Running, deployment: VllmDeployment) -> None:
    async with Pool(launcher, deployment) as pool:
        family = await pool.load()
        os.kill(launcher.process.pid, signal.SIGKILL)
        await asyncio.to_thread(until, lambda: all_gone(family))


async def test_adapters_change_without_another_replica(launcher: Running, deployment: VllmDeployment) -> None:
    def models(**lora: str) -> ModelSettings:
        return ModelSettings(name="m", deployments=(deployment.model_copy(update={"lora": lora, "max_loras": 4}),))

    first = models(legal="/legal", broken="/missing")
    async with Pool(launcher, *first.deployments) as pool:
        family = await pool.load()
        supervisor = pool.services.supervisor
        (view,) = supervisor.snapshot()
        assert view.replicas[0].replica.adapters == ("m:legal",)
        assert "'m:broken' could not be loaded" in view.detail
        await pool.services.apply([models(medical="/medical")])
        async with asyncio.timeout(WAIT_S):
            while supervisor.snapshot()[0].replicas[0].replica.adapters != ("m:medical",):
                await supervisor.changes.wait_beyond(supervisor.changes.revision)
        (view,) = supervisor.snapshot()
        assert (view.detail, view.replicas[0].pid) == ("", family[0].pid)
    # A later control process finds the engine as it is, and brings it to what is wanted by then.
    async with Pool(launcher, *models(legal="/other").deployments) as pool:
        assert (await pool.load())[0].pid == family[0].pid
        assert pool.services.supervisor.snapshot()[0].replicas[0].replica.adapters == ("m:legal",)


async def test_it_sleeps_over_a_new_control_process_and_wakes(launcher: Running, deployment: VllmDeployment) -> None:
    sleepy = deployment.model_copy(update={"sleep_when_idle": True, "keep_alive_s": 1})

    async def until_asleep(pool: Pool) -> None:
        supervisor = pool.services.supervisor
        async with asyncio.timeout(WAIT_S):
            while (view := supervisor.snapshot()[0]).detail != "asleep":
                await supervisor.changes.wait_beyond(supervisor.changes.revision)
        assert (view.state, view.replicas) == (State.IDLE, ())

    async with Pool(launcher, sleepy) as pool:
        family = await pool.load()
        await until_asleep(pool)
        assert (await pool.load())[0].pid == family[0].pid
        await until_asleep(pool)
    async with Pool(launcher, sleepy) as pool:
        await until_asleep(pool)
        assert (await pool.load())[0].pid == family[0].pid
        async with asyncio.timeout(WAIT_S):
            await pool.services.supervisor.unload(NAME, 1)
        await asyncio.to_thread(until, lambda: all_gone(family))


async def test_why_it_cannot_be_loaded_is_told(launcher: Running, deployment: VllmDeployment) -> None:
    async with Pool(launcher, deployment.model_copy(update={"model": "broken"})) as pool:
        changes = pool.services.supervisor.changes
        pool.services.supervisor.load(NAME)
        async with asyncio.timeout(WAIT_S):
            while (view := pool.services.supervisor.snapshot()[0]).state is not State.BACKOFF:
                await changes.wait_beyond(changes.revision)
        assert view.detail == "ValueError: there is no such model"


async def test_a_change_to_an_environment_without_it_is_refused(launcher: Running, deployment: VllmDeployment) -> None:
    async with Pool(launcher, deployment) as pool:
        other = deployment.model_copy(update={"python": None})
        with pytest.raises(UserError, match="has no vLLM"):
            await pool.services.apply([ModelSettings(name="m", deployments=(other,))])


@pytest.fixture
def sleepers() -> Iterator[Callable[[str], psutil.Process]]:
    """Starts processes with this mark of a replica."""
    with contextlib.ExitStack() as stack:

        def start(mark: str) -> psutil.Process:
            process = stack.enter_context(subprocess.Popen(SLEEP, env={**os.environ, MARK: mark}))
            stack.callback(process.kill)
            return psutil.Process(process.pid)

        yield start


SLEEP = ("/bin/sleep", "3600")


async def test_what_is_left_on_a_gpu_without_its_replica_is_killed(
    launcher: Running, sleepers: Callable[[str], psutil.Process]
) -> None:
    """Ours, of a replica that is gone; not: ours that runs, another installation's, and somebody else's."""
    engines = await LauncherClient.connect(launcher.socket_path)
    marked = MarkedEngines(engines, "us")
    alive = await marked.start("m/vllm-0#0", SLEEP, env={}, stdin="", meta={})
    found = [sleepers(mark) for mark in ("us:m/vllm-0#gone", "them:m/vllm-0#gone", "")]
    left, others, strangers = found
    on_gpu = [*(one.pid for one in found), alive.pid, 2**22 - 1]
    until(lambda: len(our_processes(on_gpu, "us")) == 2)
    cleaner = DeviceCleaner(lambda: [DeviceProcess(pid, "GPU-1", 1) for pid in on_gpu], marked, "us")
    await cleaner.look()
    assert left.status() != psutil.STATUS_ZOMBIE, "it may be on its way out"
    await cleaner.look()
    until(lambda: all_gone([left]))
    assert all(one.status() != psutil.STATUS_ZOMBIE for one in (others, strangers, psutil.Process(alive.pid)))
    await engines.stop(alive.name, 0)
    await engines.close()
