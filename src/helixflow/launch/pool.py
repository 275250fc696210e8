"""The pool process of a node without auth or gateways: engines for gateways elsewhere.

python -m helixflow.launch.pool --settings-fd N [--life-fd N] [--ready-fd N]
"""

import asyncio
import signal
import sys
from collections.abc import Sequence

import structlog
import uvloop

from helixflow.core.errors import ExitCode, HelixError, UserError
from helixflow.launch.launcher import SOCKET_NAME
from helixflow.launch.pool_node import PoolNode
from helixflow.launch.serving_cache import with_cached_models
from helixflow.launch.tasks import until_lost, until_stopped
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.renewal import Renewal
from helixflow.pool.launcher_client import LauncherClient
from helixflow.pool.service import create_pool
from helixflow.process.child import ChildArguments
from helixflow.settings.tree import Settings
from helixflow.telemetry.logs import configure_logging

log = structlog.get_logger("helixflow.pool")


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM. The exit code is one of `ExitCode`."""
    arguments = ChildArguments.parse(argv)
    arguments.arm()
    try:
        settings = arguments.load_settings()
        configure_logging(settings.log.level, settings.log.format, service="pool")
        uvloop.run(serve(settings, arguments))
    except UserError as exc:
        log.error("pool.failed", reason=exc.message)
        return exc.exit_code
    except HelixError as exc:
        log.error("pool.failed", reason=exc.message, exc_info=exc.__cause__)
        return ExitCode.UNAVAILABLE
    return ExitCode.OK


async def serve(settings: Settings, arguments: ChildArguments) -> None:
    """Runs until SIGTERM. Raises `UserError`, or `HelixError` when the launcher is lost or a task that must not end has
    ended.
    """
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    # Others may have been applied since the node has started.
    settings = await asyncio.to_thread(with_cached_models, settings)
    identity = await asyncio.to_thread(ServiceIdentity.open, settings, "pool")
    launcher = await LauncherClient.connect(settings.run_dir / SOCKET_NAME)
    node = PoolNode(settings, identity, create_pool(settings, launcher), reachable=True)
    tasks: list[asyncio.Task[None]] = []
    try:
        await node.start()
        runs = {
            "pool": node.run(),
            "identity": identity.follow(),
            "renewal": Renewal(settings).run(),
            "launcher": until_lost(launcher.lost),
        }
        tasks = [asyncio.create_task(run, name=name) for name, run in runs.items()]
        arguments.report_ready()
        await until_stopped(stopping, tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await node.close()
        await launcher.close()


if __name__ == "__main__":
    sys.exit(main())
