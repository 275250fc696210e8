"""What operators and probes ask: liveness, readiness, health, version, metrics."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from helixflow import __version__
from helixflow.clients.pool import DeploymentView
from helixflow.core.permissions import Permission
from helixflow.gateway.authorisation import require
from helixflow.gateway.client_address import ClientAddresses
from helixflow.gateway.exchange import Exchange
from helixflow.gateway.identification import Identification

_METRICS_TYPE = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")


class OperationsSurface:
    """`problems` names what keeps the gateway from serving, empty when it is ready; `views` are the deployments."""

    def __init__(
        self,
        registry: CollectorRegistry,
        identification: Identification,
        addresses: ClientAddresses,
        *,
        problems: Callable[[], list[str]],
        views: Callable[[], Mapping[str, DeploymentView]],
    ) -> None:
        self._registry = registry
        self._identification = identification
        self._addresses = addresses
        self._problems = problems
        self._views = views

    async def live(self, exchange: Exchange) -> None:
        """The process runs and its event loop turns."""
        await _reply(exchange, 200, {"status": "alive"})

    async def ready(self, exchange: Exchange) -> None:
        """Requests can be served now."""
        problems = self._problems()
        body: dict[str, Any] = {"status": "unready", "problems": problems} if problems else {"status": "ready"}
        await _reply(exchange, 503 if problems else 200, body)

    async def health(self, exchange: Exchange) -> None:
        """The state of each deployment; 200 as long as the gateway answers at all."""
        problems = self._problems()
        deployments = {name: view.state.lower() for name, view in self._views().items()}
        status = "degraded" if problems or "failed" in deployments.values() else "ok"
        await _reply(exchange, 200, {"status": status, "problems": problems, "deployments": deployments})

    async def version(self, exchange: Exchange) -> None:
        await _reply(exchange, 200, {"name": "helixflow", "version": __version__})

    async def metrics(self, exchange: Exchange) -> None:
        """Prometheus text; from another machine only with the permission for it."""
        address = self._addresses.find(exchange)
        if address is None or not address.is_loopback:
            require(await self._identification.identify(exchange), Permission.METRICS_READ)
        await exchange.reply(200, generate_latest(self._registry), content=_METRICS_TYPE)


async def _reply(exchange: Exchange, status: int, body: dict[str, Any]) -> None:
    headers = [(b"cache-control", b"no-store")]
    if status == 503:
        headers.append((b"retry-after", b"2"))
    await exchange.reply(status, msgspec.json.encode(body), headers)
