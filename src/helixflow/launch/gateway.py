"""A gateway process: `python -m helixflow.launch.gateway`, started by the launcher. Puts the data plane together."""

import asyncio
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence

import structlog
import uvloop

from helixflow.clients.changes import ChangeWatch
from helixflow.clients.keys import KeyResolver
from helixflow.clients.pool import DeploymentView, PoolWatch
from helixflow.clients.tokens import TokenVerifier
from helixflow.core.call import Completer
from helixflow.core.clock import SystemClock
from helixflow.core.errors import ExitCode, HelixError, UserError
from helixflow.engines.llama_cpp.engine import LlamaCppEngine
from helixflow.engines.openai import OpenAIEngine
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
from helixflow.launch.tasks import until_stopped
from helixflow.pki.contexts import ServerContext
from helixflow.pki.identity import ServiceIdentity
from helixflow.process.child import ChildArguments
from helixflow.routing.breaker import Breaker
from helixflow.routing.router import Route, Router, Target
from helixflow.routing.slots import ReplicaSlots
from helixflow.rpc.channels import create_channel
from helixflow.rpc.sockets import socket_path
from helixflow.settings.tree import LlamaCppDeployment, OpenAIDeployment, Settings
from helixflow.telemetry.logs import configure_logging
from helixflow.telemetry.metrics import DeploymentCollector, GatewayMetrics
from helixflow.telemetry.requests import RequestLog
from helixflow.transport.client import HttpClient, Timeouts
from helixflow.transport.tls import client_context

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
# Engines hold a slot a generation: more connections than this to one replica would be a fault of ours.
_ENGINE_CONNECTIONS = 1024
# None is kept: a request that changes something must not be sent again because a kept one was found dead.
_ADMIN_CONNECTIONS = 256
_IDLE_EXPIRY_S = 4.0

log = structlog.get_logger("helixflow.gateway")


class Gateway:
    """The data plane of one process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._clock = SystemClock()
        self._identity = ServiceIdentity.open(settings, "gateway")
        self._channel = create_channel(socket_path(settings.run_dir, "control"), self._identity, "auth")
        self._pool_channel = create_channel(socket_path(settings.run_dir, "pool"), self._identity, "pool")
        self._pool = PoolWatch(self._pool_channel, self._on_pool_change)
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
        self._slots: dict[str, ReplicaSlots] = {}
        self._clients: list[HttpClient] = []
        self._engine_client = self._client(max_connections=_ENGINE_CONNECTIONS)
        self._loads: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def build_app(self) -> App:
        """The ASGI application. Raises `UserError` (CONFIG) for a deployment that cannot be built."""
        settings = self._settings
        router = Router(self._build_routes())
        metrics = GatewayMetrics()
        metrics.registry.register(DeploymentCollector(self._deployment_rows))
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
                metrics.registry, identification, addresses, problems=self._problems, views=lambda: self._pool.views
            ),
            KeySetSurface(self._changes),
            ControlPlaneSurface(
                self._client(max_connections=_ADMIN_CONNECTIONS, idle_expiry_s=0),
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
        runs = {"identity": self._identity.follow(), "replicas": self._pool.run(), "changes": self._changes.run()}
        if self._metering is not None:
            runs["metering"] = self._metering.run()
        self._tasks = [asyncio.create_task(run, name=name) for name, run in runs.items()]
        return self._tasks

    async def close(self) -> None:
        """Ends watches, loads, connections; flushes the log."""
        if self._metering is not None:
            await self._metering.flush()
        for task in (*self._tasks, *self._loads):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._loads, return_exceptions=True)
        if self._metering is not None:
            await self._metering.close()
        await self._keys.close()
        for client in self._clients:
            await client.close()
        await self._channel.close()
        await self._pool_channel.close()
        self.observation.flush()

    def _build_routes(self) -> dict[str, Route]:
        created = int(time.time())
        routes = {}
        for model in self._settings.models:
            targets = []
            for index, deployment in enumerate(model.deployments):
                name = f"{model.name}/{deployment.engine}-{index}"
                engine = (
                    self._build_provider(name, model.name, deployment)
                    if isinstance(deployment, OpenAIDeployment)
                    else self._build_llama_cpp(name, deployment)
                )
                targets.append(Target(name, engine, Breaker(self._clock)))
            routes[model.name] = Route(model.name, targets, created=created)
        return routes

    def _build_llama_cpp(self, name: str, deployment: LlamaCppDeployment) -> Completer:
        slots = self._slots[name] = ReplicaSlots(
            name,
            max_queue=deployment.max_queue,
            load_wait_s=self._settings.gateway.load_wait_s,
            request_load=self._request_load,
        )
        return LlamaCppEngine(self._engine_client, slots, deployment=name, task=deployment.task)

    def _build_provider(self, name: str, model: str, deployment: OpenAIDeployment) -> Completer:
        try:
            return OpenAIEngine(
                self._client(max_connections=deployment.max_connections, deployment=deployment),
                deployment=name,
                public_model=model,
                base_url=deployment.base_url,
                model=deployment.model or model,
                api_key=deployment.api_key.read() if deployment.api_key is not None else None,
                headers={key: _expand(value) for key, value in deployment.headers.items()},
                timeouts=Timeouts(
                    connect_s=deployment.connect_timeout_s,
                    first_byte_s=deployment.first_byte_timeout_s,
                    idle_s=deployment.idle_timeout_s,
                ),
            )
        except (ValueError, OSError) as exc:
            raise UserError(f"the deployment {name}: {exc}", ExitCode.CONFIG) from exc

    def _client(
        self, *, max_connections: int, idle_expiry_s: float = _IDLE_EXPIRY_S, deployment: OpenAIDeployment | None = None
    ) -> HttpClient:
        context = None
        if deployment is not None and deployment.ca_file is not None:
            context = client_context(deployment.ca_file)
        client = HttpClient(max_connections=max_connections, idle_expiry_s=idle_expiry_s, ssl_context=context)
        self._clients.append(client)
        return client

    def _on_pool_change(self, views: Mapping[str, DeploymentView]) -> None:
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

    def _problems(self) -> list[str]:
        """What keeps this gateway from serving: models that are to be loaded from the start and are not."""
        views = self._pool.views
        problems = [] if views or not self._slots else ["the pool has not been reached yet"]
        if not self._changes.has_watched:
            problems.append("the auth service has not been reached yet")
        if self._metering is not None and not self._metering.ready:
            problems.append("prices are not known yet")
        for model in self._settings.models:
            for index, deployment in enumerate(model.deployments):
                name = f"{model.name}/{deployment.engine}-{index}"
                view = views.get(name)
                at_start = isinstance(deployment, LlamaCppDeployment) and deployment.load == "start"
                if at_start and view is not None and view.state != "ready":
                    problems.append(f"{name} is {view.state}")
        return problems

    def _deployment_rows(self) -> list[tuple[str, int, int, int, int]]:
        rows = []
        for name, slots in self._slots.items():
            view = self._pool.views.get(name)
            serving, restarts = (len(view.replicas), view.restarts) if view is not None else (0, 0)
            rows.append((name, slots.queued, slots.in_flight, serving, restarts))
        return rows


def _expand(value: str) -> str:
    """Replaces `${NAME}` by the environment. Raises `ValueError` for a variable that is not set."""

    def look_up(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    return _VARIABLE.sub(look_up, value)


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
        return int(uvloop.run(serve(arguments, settings)))
    except UserError as exc:
        log.error("gateway.refused", reason=exc.message)
        return int(exc.exit_code)


if __name__ == "__main__":
    sys.exit(main())
