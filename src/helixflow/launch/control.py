"""The control process: auth with the admin API, and the pool, each behind a gRPC server of its own.

python -m helixflow.launch.control --settings-fd N [--life-fd N] [--ready-fd N]
"""

import asyncio
import signal
import sys
from collections.abc import Sequence

import structlog
import uvloop

from helixflow.core.errors import ExitCode, HelixError, UserError
from helixflow.launch.auth_node import AuthNode
from helixflow.launch.launcher import SOCKET_NAME
from helixflow.launch.pool_node import PoolNode
from helixflow.launch.ports import is_loopback
from helixflow.launch.serving_cache import with_cached_models
from helixflow.launch.tasks import until_lost, until_stopped
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.renewal import Renewal
from helixflow.pool.launcher_client import LauncherClient
from helixflow.pool.registration import Registry
from helixflow.pool.service import create_pool
from helixflow.process.child import ChildArguments
from helixflow.settings.client import client_environment
from helixflow.settings.tree import Settings
from helixflow.telemetry.logs import configure_logging

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
    # Others may have been applied since the node has started.
    settings = await asyncio.to_thread(with_cached_models, settings)
    identity = await asyncio.to_thread(ServiceIdentity.open, settings, "control")
    launcher = await LauncherClient.connect(settings.run_dir / SOCKET_NAME)
    # Gateways of other nodes come only where an address is meant for them.
    reachable = not is_loopback(settings.pool.host)
    pool = PoolNode(settings, identity, create_pool(settings, launcher), reachable=reachable)
    registry = Registry()
    auth = AuthNode(settings, identity, bootstrap_key, registry, on_models=pool.apply)
    tasks: list[asyncio.Task[None]] = []

    async def serve_auth() -> None:
        await auth.start()
        arguments.report_ready()
        log.debug("control.ready")
        await auth.run()

    try:
        await pool.start()
        registry.set_local(pool.entry)
        runs = {
            # First of all: engines load, and gateways find them, while the database opens or is waited for.
            "pool": pool.run(),
            "identity": identity.follow(),
            "renewal": Renewal(settings).run(),
            "launcher": until_lost(launcher.lost),
            # A task as well: it may wait for its database for long, and the others must not end unseen meanwhile.
            "auth": serve_auth(),
        }
        tasks = [asyncio.create_task(run, name=name) for name, run in runs.items()]
        await until_stopped(stopping, tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await pool.close()
        await auth.close()
        await launcher.close()


if __name__ == "__main__":
    sys.exit(main())
