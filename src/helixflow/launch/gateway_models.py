"""The models that one gateway serves: engines for their deployments, and the routes over them."""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from helixflow.core.clock import Clock
from helixflow.launch.gateway_engines import EngineBuilder
from helixflow.launch.gateway_pools import GatewayPools
from helixflow.launch.gateway_targets import Deployed, TargetBuilder, changed_keys
from helixflow.routing.balancing import Balancer
from helixflow.routing.candidates import CostBound
from helixflow.routing.health import Health
from helixflow.routing.outliers import Outliers
from helixflow.routing.probes import Probes
from helixflow.routing.retry_budget import RetryBudget
from helixflow.routing.router import Router
from helixflow.routing.slots import ReplicaSlots
from helixflow.routing.table import RoutingTable, build_table
from helixflow.settings.deployments import LaunchedDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.serving import RoutingSettings


class Metering(Protocol):
    """What follows the models: calls must be priced before they can be made."""

    async def prepare(self, models: Sequence[ModelSettings]) -> None:
        """Raises `HelixError` when that is not possible now."""
        ...


class GatewayModels:
    """Everything between a call and its engines.

    No call takes longer than `longest_call_s`. So many `gateways` share the ceilings of deployments. `cost_bound` gives
    the nanodollars that a call may cost at most at a deployment; None where nothing has a price. Making it raises
    `UserError` (CONFIG) for a deployment that cannot be built.
    """

    def __init__(
        self,
        models: Sequence[ModelSettings],
        pools: GatewayPools,
        clock: Clock,
        *,
        routing: RoutingSettings,
        balancer: Balancer,
        longest_call_s: float = 600,
        gateways: int = 1,
        cost_bound: CostBound | None = None,
    ) -> None:
        self._pools = pools
        self._longest_call_s = longest_call_s
        self._engines = EngineBuilder(pools.tls)
        self._targets = TargetBuilder(self._engines, routing, clock, gateways)
        self._created = int(time.time())
        self._models = tuple(models)
        self._deployed: Mapping[str, Deployed] = self._targets.deploy(models, self._open_slots(models), {})
        self._applying = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        self._gone: list[Deployed] = []
        self.router = Router(
            self._table(models, self._deployed),
            balancer=balancer,
            retries=RetryBudget(routing, clock),
            clock=clock,
            cost_bound=cost_bound,
        )
        self._probes = Probes(lambda: [one.target for one in self._deployed.values()], clock)
        self._outliers = Outliers(routing)

    async def run(self) -> None:
        """Looks after the deployments' health, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._probes.run(), name="probes")
            tasks.create_task(self._outliers.run(self._tiers), name="outliers")

    @property
    def models(self) -> tuple[ModelSettings, ...]:
        """Those that are served."""
        return self._models

    async def apply(self, models: Sequence[ModelSettings], metering: Metering | None = None) -> None:
        """Serves these models from now on: all of them or, when it raises, those from before. Calls that run are left
        alone; what they use is closed after them.

        Raises `UserError` (CONFIG) for a deployment that cannot be built, `HelixError` while it cannot be priced.
        """
        async with self._applying:
            await self._apply(tuple(models), metering)

    async def renew_keys(self, metering: Metering | None = None) -> list[str]:
        """Builds deployments anew whose key files have changed, and returns their names. Raises as `apply`."""
        async with self._applying:
            before = self._deployed
            if not await asyncio.to_thread(changed_keys, before):
                return []
            await self._apply(self._models, metering)
            return [name for name, one in self._deployed.items() if one.key != before[name].key]

    def _tiers(self) -> list[list[tuple[str, Health]]]:
        """Each tier that is served, once: the names and the health of its deployments."""
        tiers = {id(tier): tier for route in self.router.routes.values() for tier in route.tiers}
        return [[(target.deployment, target.health) for target in tier.targets] for tier in tiers.values()]

    async def close(self) -> None:
        """Closes connections to engines and providers."""
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        await _close((*self._gone, *self._deployed.values()))
        await self._engines.close()

    async def _apply(self, models: tuple[ModelSettings, ...], metering: Metering | None) -> None:
        before = self._deployed
        slots = self._open_slots(models)
        deployed: Mapping[str, Deployed] = {}
        try:
            deployed = await asyncio.to_thread(self._targets.deploy, models, slots, before)
            if metering is not None:
                await metering.prepare(models)
        except BaseException:
            await _close(_without(deployed, before))
            self._close_slots(slots.keys() - self._open_slots(self._models).keys())
            raise
        # Nothing waits from here on: a call finds either all of it or nothing.
        table = self._table(models, deployed)
        self._models, self._deployed = models, deployed
        self.router.replace(table)
        self._close_slots({name for name, one in before.items() if one.target.slots is not None} - slots.keys())
        if gone := _without(before, deployed):
            self._gone += gone
            task = asyncio.create_task(self._retire(gone), name="retirement of deployments")
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def _retire(self, gone: Sequence[Deployed]) -> None:
        """Closes connections after the last call that may use them: one that began before may still come back to a
        deployment when another one fails.
        """
        await asyncio.sleep(self._longest_call_s)
        await _close(gone)
        self._gone = [one for one in self._gone if one not in gone]

    def _table(self, models: Sequence[ModelSettings], deployed: Mapping[str, Deployed]) -> RoutingTable:
        targets = {name: one.target for name, one in deployed.items()}
        return build_table(models, targets, created=self._created)

    def _open_slots(self, models: Sequence[ModelSettings]) -> dict[str, ReplicaSlots]:
        """Those of launched deployments, by name; one that goes on under its name keeps its own."""
        return {
            name: self._pools.open_slots(name, deployment, affinity=model.affinity)
            for model in models
            for name, deployment in model.named_deployments()
            if isinstance(deployment, LaunchedDeployment)
        }

    def _close_slots(self, names: Iterable[str]) -> None:
        for name in names:
            self._pools.close_slots(name)


def _without(some: Mapping[str, Deployed], others: Mapping[str, Deployed]) -> list[Deployed]:
    """Those of `some` whose clients `others` do not use."""
    used = {id(one.client) for one in others.values()}
    return [one for one in some.values() if one.client is not None and id(one.client) not in used]


async def _close(deployed: Iterable[Deployed]) -> None:
    for one in deployed:
        if one.client is not None:
            await one.client.close()
