"""The pools that one gateway uses: which replicas there are, whose slots they have, and loading on request."""

import asyncio
from collections.abc import Mapping

import grpc
import structlog

from helixflow.clients.pool import DeploymentView, PoolWatch
from helixflow.core.errors import HelixError
from helixflow.routing.slots import ReplicaSlots
from helixflow.settings.deployments import LaunchedDeployment
from helixflow.settings.tree import Settings

log = structlog.get_logger("helixflow.gateway")


class GatewayPools:
    """`run` it while the gateway serves, `close` it at the end."""

    def __init__(self, settings: Settings, channel: grpc.aio.Channel) -> None:
        self._settings = settings
        self._pool = PoolWatch(channel, self._on_change)
        self._slots: dict[str, ReplicaSlots] = {}
        self._launched: dict[str, LaunchedDeployment] = {}
        self._loads: set[asyncio.Task[None]] = set()

    @property
    def views(self) -> Mapping[str, DeploymentView]:
        """What pools last said of the deployments they serve."""
        return self._pool.views

    async def run(self) -> None:
        """Follows the pool, until cancelled."""
        await self._pool.run()

    async def close(self) -> None:
        """Ends loads that were asked for. Cancel `run` before."""
        for task in self._loads:
            task.cancel()
        await asyncio.gather(*self._loads, return_exceptions=True)

    def open_slots(self, name: str, deployment: LaunchedDeployment) -> ReplicaSlots:
        """The slots of a deployment, from now on until `close_slots`."""
        self._launched[name] = deployment
        slots = self._slots[name] = ReplicaSlots(
            name,
            max_queue=deployment.max_queue,
            load_wait_s=self._settings.gateway.load_wait_s,
            request_load=self._request_load,
        )
        if (view := self._pool.views.get(name)) is not None:
            slots.update(view)
        return slots

    def close_slots(self, name: str) -> None:
        """The deployment is not served any more; leases that are out stay good until they are released."""
        del self._slots[name]
        del self._launched[name]

    def problems(self) -> list[str]:
        """Models that are to be loaded from the start and are not."""
        views = self._pool.views
        if self._slots and not views:
            return ["the pool has not been reached yet"]
        return [
            f"{name} is {view.state}"
            for name, deployment in self._launched.items()
            if deployment.load == "start" and (view := views.get(name)) is not None and view.state != "ready"
        ]

    def rows(self) -> list[tuple[str, int, int, int, int]]:
        """For metrics: deployment, requests queued, in flight, replicas that serve, restarts."""
        rows = []
        for name, slots in self._slots.items():
            view = self._pool.views.get(name)
            serving, restarts = (len(view.replicas), view.restarts) if view is not None else (0, 0)
            rows.append((name, slots.queued, slots.in_flight, serving, restarts))
        return rows

    def _on_change(self, views: Mapping[str, DeploymentView]) -> None:
        for name, view in views.items():
            if name in self._slots:
                self._slots[name].update(view)

    def _request_load(self, deployment: str) -> None:
        task = asyncio.create_task(self._load(deployment))
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)

    async def _load(self, deployment: str) -> None:
        try:
            await self._pool.load(deployment)
        except HelixError as exc:
            log.warning("deployment.load_refused", deployment=deployment, code=exc.code)
