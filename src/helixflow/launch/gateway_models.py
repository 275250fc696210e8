"""The models that one gateway serves: engines for their deployments, and the routes over them."""

import time
from collections.abc import Sequence

from helixflow.core.clock import Clock
from helixflow.launch.gateway_engines import EngineBuilder
from helixflow.launch.gateway_pools import GatewayPools
from helixflow.routing.breaker import Breaker
from helixflow.routing.router import Route, Router, Target
from helixflow.settings.deployments import LaunchedDeployment
from helixflow.settings.models import ModelSettings
from helixflow.transport.client import HttpClient


class GatewayModels:
    """Everything between a call and its engines.

    Making it raises `UserError` (CONFIG) for a deployment that cannot be built.
    """

    def __init__(self, models: Sequence[ModelSettings], pools: GatewayPools, clock: Clock) -> None:
        self._clock = clock
        self._pools = pools
        self._clients: list[HttpClient] = []
        self._engines = EngineBuilder(pools.tls)
        self.router = Router(self._build_routes(models))

    async def close(self) -> None:
        """Closes connections to engines and providers."""
        for client in self._clients:
            await client.close()
        await self._engines.close()

    def _build_routes(self, models: Sequence[ModelSettings]) -> dict[str, Route]:
        created = int(time.time())
        routes = {}
        for model in models:
            targets = []
            for name, deployment in model.named_deployments():
                slots = None
                if isinstance(deployment, LaunchedDeployment):
                    slots = self._pools.open_slots(name, deployment)
                engine, client = self._engines.build(name, model.name, deployment, slots)
                if client is not None:
                    self._clients.append(client)
                targets.append(Target(name, engine, Breaker(self._clock)))
            routes[model.name] = Route(model.name, targets, created=created)
        return routes
