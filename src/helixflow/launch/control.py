"""The control process: auth with the admin API, and the pool, each behind a gRPC server of its own.

python -m helixflow.launch.control --settings-fd N [--life-fd N] [--ready-fd N]
"""

import asyncio
import signal
import sys
from collections.abc import Sequence
from typing import Final

import grpc
import structlog
import uvloop

from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.launch.auth_node import AuthNode
from helixflow.launch.launcher import SOCKET_NAME
from helixflow.launch.tasks import until_stopped
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.renewal import Renewal
from helixflow.pool import service as pool
from helixflow.pool.launcher_client import LauncherClient
from helixflow.process.child import ChildArguments
from helixflow.rpc.peers import Policy
from helixflow.rpc.servers import add_health_and_reflection, create_server, listen
from helixflow.rpc.sockets import socket_path
from helixflow.settings.client import client_environment
from helixflow.settings.tree import Settings
from helixflow.telemetry.logs import configure_logging

_STOP_GRACE_S: Final = 1.0
_POOL_POLICY: Final[Policy] = {pool.SERVICE_NAME: frozenset({"gateway", "console", "control"})}

log = structlog.get_logger("helixflow.control")


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM. The exit code is one of `ExitCode`."""
    arguments = ChildArguments.parse(argv)
    arguments.arm()
    try:
        settings = arguments.load_settings()
        configure_logging(settings.log.level, settings.log.format, service="control")
        # The bootstrap key is no setting: it travels in the environment and is never written down.
        uvloop.run(serve(settings, arguments, client_environment().bootstrap_api_key))
    except UserError as exc:
        log.error("control.failed", reason=exc.message)
        return exc.exit_code
    except HelixError as exc:
        log.error("control.failed", reason=exc.message, exc_info=exc.__cause__)
        return ExitCode.UNAVAILABLE
    return ExitCode.OK


async def serve(settings: Settings, arguments: ChildArguments, bootstrap_key: str | None) -> None:
    """Runs both services until SIGTERM. Raises `UserError`, or `HelixError` when the launcher is lost or a task that
    must not end has ended.
    """
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    identity = await asyncio.to_thread(ServiceIdentity.open, settings, "control")
    launcher = await LauncherClient.connect(settings.run_dir / SOCKET_NAME)
    supervision = pool.create_pool(settings, launcher)
    # First of all: engines load, and gateways find them, while the database opens or is waited for.
    tasks = [asyncio.create_task(supervision.run(), name="pool")]
    auth = AuthNode(settings, identity, bootstrap_key)
    server: grpc.aio.Server | None = None

    async def serve_auth() -> None:
        await auth.start()
        arguments.report_ready()
        log.debug("control.ready")
        await auth.run()

    try:
        tasks.append(asyncio.create_task(identity.follow(), name="identity"))
        tasks.append(asyncio.create_task(Renewal(settings).run(), name="renewal"))
        tasks.append(asyncio.create_task(_until_lost(launcher), name="launcher"))
        server = await _start_pool(settings, identity, supervision)
        # A task as well: it may wait for its database for long, and the others must not end unseen meanwhile.
        tasks.append(asyncio.create_task(serve_auth(), name="auth"))
        await until_stopped(stopping, tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await supervision.close()
        await auth.close()
        if server is not None:
            await server.stop(_STOP_GRACE_S)
        await launcher.close()


async def _start_pool(settings: Settings, identity: ServiceIdentity, supervision: pool.PoolServices) -> grpc.aio.Server:
    server = create_server(identity, _POOL_POLICY)
    supervision.register(server)
    await add_health_and_reflection(server, [pool.SERVICE_NAME])
    await listen(server, socket_path(settings.run_dir, "pool"), identity)
    await server.start()
    return server


async def _until_lost(launcher: LauncherClient) -> None:
    """Raises `HelixError` once there is nobody left to start engines."""
    await launcher.lost.wait()
    raise HelixError(ErrorKind.UNAVAILABLE, "The launcher's socket is gone.")


if __name__ == "__main__":
    sys.exit(main())
