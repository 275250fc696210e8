"""The control process: auth and pool behind one gRPC server on `data_dir/run/control.sock`.

python -m helixflow.launch.control --settings-fd N [--life-fd N] [--ready-fd N]
"""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

import structlog
import uvloop

from helixflow.auth import service as auth
from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.launch.launcher import CONTROL_SOCKET_NAME, SOCKET_NAME
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.renewal import Renewal
from helixflow.pool import service as pool
from helixflow.pool.launcher_client import LauncherClient
from helixflow.process.child import ChildArguments
from helixflow.rpc.peers import Policy
from helixflow.rpc.servers import add_health_and_reflection, create_server, listen, listen_tcp
from helixflow.settings.tree import Settings
from helixflow.telemetry.logs import configure_logging

_STOP_GRACE_S: Final = 1.0
# Who may call what here. A gateway resolves keys; only the console administers.
POLICY: Final[Policy] = {
    "helixflow.auth.v1.IdentityService": frozenset({"gateway", "console"}),
    "helixflow.auth.v1.SessionService": frozenset({"console"}),
    "helixflow.auth.v1.AdminService": frozenset({"console"}),
    "helixflow.pool.v1.PoolService": frozenset({"gateway", "console", "control"}),
}

log = structlog.get_logger("helixflow.control")


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM. The exit code is one of `ExitCode`."""
    arguments = ChildArguments.parse(argv)
    arguments.arm()
    try:
        settings = arguments.load_settings()
        configure_logging(settings.log.level, settings.log.format, service="control")
        # The bootstrap key is no setting: it travels in the environment and is never written down.
        bootstrap = os.environ.get("HELIXFLOW_BOOTSTRAP_API_KEY") or None
        uvloop.run(serve(settings, arguments, bootstrap))
    except UserError as exc:
        log.error("control.failed", reason=exc.message)
        return exc.exit_code
    except HelixError as exc:
        log.error("control.failed", reason=exc.message)
        return ExitCode.UNAVAILABLE
    return ExitCode.OK


async def serve(settings: Settings, arguments: ChildArguments, bootstrap: str | None) -> None:
    """Runs both services until SIGTERM. Raises `UserError`, or `HelixError` when the launcher is lost."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    identity = await asyncio.to_thread(ServiceIdentity.open, settings, "control")
    launcher = await LauncherClient.connect(settings.run_dir / SOCKET_NAME)
    supervision = pool.create_pool(settings, launcher)
    # First of all: engines load while the database opens.
    supervising = asyncio.create_task(supervision.run(), name="pool")
    upkeep = [asyncio.create_task(identity.follow()), asyncio.create_task(Renewal(settings).run())]
    authentication: auth.AuthServices | None = None
    server = create_server(identity, POLICY)
    try:
        authentication = await auth.create_auth(settings, bootstrap)
        authentication.register(server)
        supervision.register(server)
        health = await add_health_and_reflection(server, [auth.SERVICE_NAME, pool.SERVICE_NAME])
        await listen(server, settings.run_dir / CONTROL_SOCKET_NAME, identity)
        await listen_tcp(server, settings.auth.host, settings.auth.port, identity)
        await server.start()
        arguments.report_ready()
        log.debug("control.ready")
        await _until_stopped(stopping, launcher, supervising)
        await health.enter_graceful_shutdown()
    finally:
        supervising.cancel()
        await asyncio.wait((supervising,))
        await supervision.close()
        if authentication is not None:
            await authentication.close()
        await server.stop(_STOP_GRACE_S)
        for task in upkeep:
            task.cancel()
        await asyncio.wait(upkeep)
        await launcher.close()


async def _until_stopped(stopping: asyncio.Event, launcher: LauncherClient, supervising: "asyncio.Task[None]") -> None:
    """Returns when asked to stop. Raises when there is nothing left to go on with."""
    waits = {asyncio.create_task(stopping.wait()), asyncio.create_task(launcher.lost.wait())}
    try:
        await asyncio.wait({*waits, supervising}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    if stopping.is_set():
        return
    if launcher.lost.is_set():
        raise HelixError(ErrorKind.UNAVAILABLE, "The launcher's socket is gone.")
    await supervising


if __name__ == "__main__":
    sys.exit(main())
