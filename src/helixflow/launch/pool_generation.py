"""How a pool generates for peers that speak gRPC: as a gateway would, over its own engines only."""

import asyncio
from collections.abc import Sequence
from typing import Final

from helixflow.core.call import Call, Stream
from helixflow.core.clock import SystemClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.launch.gateway_models import GatewayModels
from helixflow.launch.gateway_pools import GatewayPools
from helixflow.pki.identity import ServiceIdentity
from helixflow.pool.plan import pool_name
from helixflow.routing.balancing import Balancer
from helixflow.settings.deployments import LaunchedDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.tree import Settings

_OPEN_TIMEOUT_S: Final = 5.0


class PoolGeneration:
    """Implements `Completer` over this node's pool. `run` it while the pool serves.

    The pool is its own client, so that slots are shared with gateways in the one way there is. All of it is made with
    the first request: most pools are never asked.
    """

    def __init__(self, settings: Settings, identity: ServiceIdentity) -> None:
        self._settings = settings
        self._identity = identity
        self._models: GatewayModels | None = None
        self._wanted = asyncio.Event()
        self._made = asyncio.Event()

    async def open(self, call: Call) -> Stream:
        self._wanted.set()
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT_S):
                await self._made.wait()
        except TimeoutError as exc:
            raise HelixError(ErrorKind.UNAVAILABLE, "The pool is not ready yet.", retry_after_s=1) from exc
        assert self._models is not None
        return await self._models.router.open(call)

    async def apply(self, models: Sequence[ModelSettings]) -> None:
        """These models are served from now on. Raises as `GatewayModels.apply`."""
        self._settings = self._settings.model_copy(update={"models": tuple(models)})
        if self._models is not None:
            await self._models.apply(own_models(self._settings))

    async def run(self) -> None:
        """Until cancelled."""
        await self._wanted.wait()
        settings, clock = self._settings, SystemClock()
        balancer = Balancer.of(settings.routing, clock)
        pools = GatewayPools(settings, self._identity, None, balancer)
        try:
            self._models = GatewayModels(
                own_models(settings),
                pools,
                clock,
                routing=settings.routing,
                balancer=balancer,
                longest_call_s=settings.gateway.request_timeout_s,
            )
            self._made.set()
            await pools.run()
        finally:
            self._made.clear()
            await pools.close()
            if self._models is not None:
                await self._models.close()


def own_models(settings: Settings) -> list[ModelSettings]:
    """The models that this node has engines for, with those deployments alone and nothing to fall back to."""
    node = pool_name(settings)
    models = []
    for model in settings.models:
        named = zip(
            model.deployments, (model.local_name(index) for index in range(len(model.deployments))), strict=True
        )
        own = tuple(
            # By name: alone it would have another position, and so another name.
            one.model_copy(update={"name": name})
            for one, name in named
            if isinstance(one, LaunchedDeployment) and (not one.nodes or node in one.nodes)
        )
        if own:
            models.append(model.model_copy(update={"deployments": own, "fallbacks": (), "residency": None}))
    return models
