"""A gateway process: `python -m helixflow.launch.gateway`, started by the launcher. Puts the data plane together."""

import asyncio
import gc
import signal
import socket
import sys
from collections.abc import Sequence

import structlog
import uvloop

from helixflow.clients.changes import ChangeWatch
from helixflow.clients.keys import KeyResolver
from helixflow.clients.tokens import TokenVerifier
from helixflow.core.call import Call, Completer
from helixflow.core.clock import SystemClock
from helixflow.core.errors import ExitCode, HelixError, UserError
from helixflow.gateway.app import App
from helixflow.gateway.client_address import ClientAddresses
from helixflow.gateway.cors import Cors
from helixflow.gateway.identification import Identification
from helixflow.gateway.observation import Observation
from helixflow.gateway.server import GatewayServer, Listener
from helixflow.gateway.sign_in_rate import SignInRate
from helixflow.gateway.surfaces.control_plane import ControlPlaneSurface
from helixflow.gateway.surfaces.key_set import KeySetSurface
from helixflow.gateway.surfaces.openai import OpenAISurface
from helixflow.gateway.surfaces.operations import OperationsSurface
from helixflow.launch.gateway_metering import GatewayMetering
from helixflow.launch.gateway_models import GatewayModels
from helixflow.launch.gateway_pools import GatewayPools
from helixflow.launch.gateway_serving import GatewayServing
from helixflow.launch.serving_cache import with_cached_models
from helixflow.launch.tasks import until_stopped
from helixflow.pki.contexts import ServerContext
from helixflow.pki.identity import ServiceIdentity
from helixflow.process.child import ChildArguments
from helixflow.routing.balancing import Balancer
from helixflow.rpc.channels import create_channel
from helixflow.rpc.sockets import socket_path
from helixflow.settings.tree import Settings
from helixflow.telemetry.logs import configure_logging
from helixflow.telemetry.metrics import DeploymentCollector, GatewayMetrics
from helixflow.telemetry.requests import RequestLog
from helixflow.transport.client import HttpClient

_ADMIN_CONNECTIONS = 256

log = structlog.get_logger("helixflow.gateway")


class Gateway:
    """The data plane of one process. Making it raises `UserError`, CONFIG or STORAGE."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._clock = SystemClock()
        self._identity = ServiceIdentity.open(settings, "gateway")
        self._channel = create_channel(socket_path(settings.run_dir, "control"), self._identity, "auth")
        balancer = Balancer.of(settings.routing, self._clock)
        self._pools = GatewayPools(settings, self._identity, self._channel, balancer)
        self._models = GatewayModels(
            settings.models,
            self._pools,
            self._clock,
            routing=settings.routing,
            balancer=balancer,
            longest_call_s=settings.gateway.request_timeout_s,
            gateways=settings.redis.gateways if settings.redis.url else 1,
            cost_bound=self._cost_bound if settings.metering.enabled else None,
        )
        self._changes = ChangeWatch(self._channel, clock=self._clock)
        self._keys = KeyResolver(
            self._channel,
            self._changes,
            size=settings.gateway.key_cache_size,
            ttl_s=settings.gateway.key_cache_ttl_s,
            grace_s=settings.gateway.key_cache_grace_s,
            clock=self._clock,
        )
        self._tokens = TokenVerifier(
            self._changes,
            size=settings.gateway.token_cache_size,
            grace_s=settings.gateway.key_cache_grace_s,
            clock=self._clock,
        )
        self._metering = (
            GatewayMetering(settings, self._channel, self._changes, self._clock) if settings.metering.enabled else None
        )
        self._serving = GatewayServing(self._channel, self._models, self._metering, settings.pool.name or "")
        # None is kept: a request that changes something must not be sent again because a kept one was found dead.
        self._admin_client = HttpClient(max_connections=_ADMIN_CONNECTIONS, idle_expiry_s=0)
        self._tasks: list[asyncio.Task[None]] = []

    def build_app(self) -> App:
        """The ASGI application."""
        settings = self._settings
        router = self._models.router
        metrics = GatewayMetrics()
        metrics.registry.register(DeploymentCollector(self._pools.rows))
        log_requests = settings.log.level in ("debug", "info")
        self.observation = Observation(metrics, RequestLog(sys.stderr, settings.log.format, enabled=log_requests))
        completer: Completer = router
        if self._metering is not None:
            completer = metered = self._metering.wrap(router)
            metrics.registry.register(self._metering.collect_from(metered))
        addresses = ClientAddresses(settings.gateway.trusted_proxies)
        identification = Identification(self._keys, self._tokens, addresses)
        return App(
            OpenAISurface(settings.gateway, identification, router, completer),
            OperationsSurface(
                metrics.registry, identification, addresses, problems=self._problems, views=lambda: self._pools.views
            ),
            KeySetSurface(self._changes),
            ControlPlaneSurface(
                self._admin_client,
                socket_path(settings.run_dir, "admin"),
                addresses,
                SignInRate(settings.gateway.sign_ins_per_minute, self._clock),
                timeout_s=settings.gateway.request_timeout_s,
            ),
            cors=Cors(settings.gateway.cors),
            metrics=metrics,
            observation=self.observation,
        )

    def start_watches(self) -> Sequence[asyncio.Task[None]]:
        """Begins to follow what the gateway depends on. None of these tasks ends by itself; `close` cancels them."""
        runs = {"identity": self._identity.follow(), "replicas": self._pools.run(), "changes": self._changes.run()}
        runs["health of deployments"] = self._models.run()
        runs["serving configuration"] = self._serving.run()
        if self._metering is not None:
            runs["metering"] = self._metering.run()
        self._tasks = [asyncio.create_task(run, name=name) for name, run in runs.items()]
        return self._tasks

    async def close(self) -> None:
        """Ends watches, loads, connections; flushes the log."""
        if self._metering is not None:
            await self._metering.flush()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._metering is not None:
            await self._metering.close()
        await self._keys.close()
        await self._pools.close()
        await self._models.close()
        await self._admin_client.close()
        await self._channel.close()
        self.observation.flush()

    def _cost_bound(self, deployment: str, call: Call) -> int:
        assert self._metering is not None
        return self._metering.cost_bound(deployment, call)

    def _problems(self) -> list[str]:
        """What keeps this gateway from serving."""
        problems = self._pools.problems()
        if not self._changes.has_watched:
            problems.append("the auth service has not been reached yet")
        if self._metering is not None and not self._metering.ready:
            problems.append("prices are not known yet")
        return problems


async def serve(arguments: ChildArguments, settings: Settings) -> ExitCode:
    """Runs until SIGTERM, or until a task ends without which it would serve on with old keys, certificates or views:
    that is logged. Drains in both cases. Raises `UserError` when it cannot start.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    gateway = Gateway(settings)
    app = gateway.build_app()
    listeners = [Listener(_inherited(arguments.listen_fd))]
    upkeep = []
    if arguments.tls_listen_fd is not None:
        certificate = await asyncio.to_thread(ServerContext.open, settings)
        listeners.append(Listener(_inherited(arguments.tls_listen_fd), certificate.context))
        upkeep.append(asyncio.create_task(certificate.follow(), name="https certificate"))
    server = GatewayServer(app, settings.gateway, listeners)
    watches = gateway.start_watches()
    await server.start()
    upkeep.append(asyncio.create_task(server.run(), name="housekeeping"))
    # What is there now stays. Looked at again with each full collection it would stop all streams for 40 ms.
    gc.collect()
    gc.freeze()
    arguments.report_ready()
    exit_code = ExitCode.OK
    try:
        try:
            await until_stopped(stop, [*watches, *upkeep])
        except (HelixError, UserError) as exc:
            # The launcher starts another one.
            log.error("gateway.failed", reason=exc.message, exc_info=exc.__cause__)
            exit_code = ExitCode.UNAVAILABLE
        await server.drain()
    finally:
        for task in upkeep:
            task.cancel()
        await asyncio.gather(*upkeep, return_exceptions=True)
        await gateway.close()
    return exit_code


def _inherited(fd: int | None) -> socket.socket:
    """The listening socket that the launcher opened."""
    listener = socket.socket(fileno=fd)
    listener.setblocking(False)
    return listener


def main() -> int:
    arguments = ChildArguments.parse()
    arguments.arm()
    settings = arguments.load_settings()
    configure_logging(settings.log.level, settings.log.format, service=arguments.name or "gateway")
    try:
        return int(uvloop.run(serve(arguments, with_cached_models(settings))))
    except UserError as exc:
        log.error("gateway.refused", reason=exc.message)
        return int(exc.exit_code)


if __name__ == "__main__":
    sys.exit(main())
