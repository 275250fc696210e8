"""The relay process: the data port of a pool, where gateways of other nodes reach its engines.

python -m helixflow.launch.relay --settings-fd N --listen-fd N [--life-fd N] [--ready-fd N]

On its own because every byte of the answers for other nodes passes here: neither the pool's gRPC nor its supervision
waits for that. It loads no gRPC.
"""

import asyncio
import signal
import socket
import sys
from collections.abc import Sequence

import structlog
import uvloop

from helixflow.core.errors import ExitCode, HelixError, UserError
from helixflow.launch.launcher import SOCKET_NAME
from helixflow.launch.tasks import until_lost, until_stopped
from helixflow.pki.identity import ServiceIdentity
from helixflow.pool.data_routes import DataRoutes
from helixflow.pool.launcher_client import LauncherClient
from helixflow.pool.relay import Relay
from helixflow.process.child import ChildArguments
from helixflow.settings.tree import Settings
from helixflow.telemetry.logs import configure_logging

log = structlog.get_logger("helixflow.relay")


def main(argv: Sequence[str] | None = None) -> int:
    """Relays until SIGTERM. The exit code is one of `ExitCode`."""
    arguments = ChildArguments.parse(argv)
    arguments.arm()
    try:
        settings = arguments.load_settings()
        configure_logging(settings.log.level, settings.log.format, service="relay")
        uvloop.run(serve(settings, arguments))
    except UserError as exc:
        log.error("relay.failed", reason=exc.message)
        return exc.exit_code
    except HelixError as exc:
        log.error("relay.failed", reason=exc.message, exc_info=exc.__cause__)
        return ExitCode.UNAVAILABLE
    return ExitCode.OK


async def serve(settings: Settings, arguments: ChildArguments) -> None:
    """Relays until SIGTERM, then until the gateways have left or the drain's time is over.

    Raises `UserError`, or `HelixError` when the launcher is lost or a task that must not end has ended.
    """
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    listener = socket.socket(fileno=arguments.listen_fd)
    listener.setblocking(False)
    identity = await asyncio.to_thread(ServiceIdentity.open, settings, "pool")
    launcher = await LauncherClient.connect(settings.run_dir / SOCKET_NAME)
    relay = Relay(listener, identity, DataRoutes(launcher, identity.trust_domain))
    tasks = [
        asyncio.create_task(relay.run(), name="relay"),
        asyncio.create_task(until_lost(launcher.lost), name="launcher"),
    ]
    try:
        await relay.start()
        arguments.report_ready()
        log.debug("relay.ready")
        await until_stopped(stopping, tasks)
        await relay.drain(settings.gateway.drain_timeout_s)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await relay.close()
        await launcher.close()


if __name__ == "__main__":
    sys.exit(main())
