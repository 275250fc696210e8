"""An engine that sleeps instead of ending: it keeps its process and its weights in RAM, and has no memory of GPUs."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import structlog

from helixflow.core.errors import HelixError
from helixflow.pool.launcher_client import RunningEngine
from helixflow.pool.memory import Need
from helixflow.pool.model_folder import weights_bytes
from helixflow.pool.plan import PlannedDeployment
from helixflow.pool.replica import ReplicaLives
from helixflow.pool.residency import Residency, Room, Tenant

log = structlog.get_logger("helixflow.pool")


class Sleep:
    """Of the engine of one seat. `is_asleep` is for the seat to undo once that engine has ended."""

    def __init__(self, planned: PlannedDeployment, tenant: Tenant, lives: ReplicaLives, residency: Residency) -> None:
        self.is_asleep = False
        self._planned = planned
        self._tenant = tenant
        self._lives = lives
        self._residency = residency
        self._awake = Need(0)

    async def fall_asleep(self, engine: RunningEngine, room: Room, grace_s: float) -> bool:
        """Once its generations have ended, at the latest after `grace_s`. False when it has to end instead: it cannot
        sleep, or there is no RAM for its weights.
        """
        if not self._lives.can_sleep or room.is_loading:
            return False
        ram_bytes = await self._ram_asleep(engine, room)
        limits, taken = await self._residency.read_capacity()
        if taken - room.need.ram_bytes + ram_bytes > limits.ram_bytes:
            log.info("replica.not_asleep", replica=engine.name, reason="no RAM for its weights")
            return False
        self._awake = room.need
        room.correct(replace(room.need, ram_bytes=ram_bytes))
        try:
            await self._lives.put_to_sleep(engine, grace_s)
        except HelixError as exc:
            log.warning("replica.not_asleep", replica=engine.name, reason=exc.message)
            return False
        room.free_gpus()
        self.is_asleep = True
        log.info("replica.asleep", replica=engine.name)
        return True

    async def recognise(self, engine: RunningEngine, room: Room) -> bool:
        """Whether an engine of an earlier control process sleeps. One that does not answer does not."""
        try:
            if not self._lives.can_sleep or not await self._lives.is_asleep(engine):
                return False
        except HelixError:
            return False
        self._awake = room.need
        room.correct(replace(room.need, ram_bytes=await self._ram_asleep(engine, room)))
        room.free_gpus()
        room.is_loading = False
        self.is_asleep = True
        return True

    async def wake(
        self, engine: RunningEngine, room: Room, *, deadline: float, evict: bool, tell: Callable[[str], None]
    ) -> None:
        """Takes its GPUs again, once they are free, and wakes it; `deadline`, `evict` and `tell` as for an admission.

        Raises `NoRoomError`, and `HelixError` when it does not wake up; whether it sleeps is then not known.
        """
        gpus = _gpus_of(engine)
        need = Need(0, gpu_bytes=sum(gpus.values()), gpu_count=len(gpus), gpus=tuple(gpus))
        room.is_loading = True
        try:
            held = await self._residency.admit(self._tenant, need, deadline=deadline, evict=evict, tell=tell)
        except BaseException:
            room.is_loading = False
            raise
        room.take_over(held)
        room.correct(self._awake)
        self.is_asleep = False
        await self._lives.wake(engine)
        log.info("replica.awake", replica=engine.name)

    async def _ram_asleep(self, engine: RunningEngine, room: Room) -> int:
        """What it has now, and its weights where they are on GPUs: at most all that it was given of those."""
        given = sum(_gpus_of(engine).values())
        folder = self._planned.model_folder
        if not given or folder is None:
            return room.need.ram_bytes + given
        try:
            return room.need.ram_bytes + min(given, await asyncio.to_thread(weights_bytes, folder))
        except OSError:
            return room.need.ram_bytes + given


def _gpus_of(engine: RunningEngine) -> dict[str, int]:
    """What it was given of each GPU when it was started: it can have no others."""
    return {str(uuid): int(size) for uuid, size in (engine.meta.get("gpus") or {}).items()}
