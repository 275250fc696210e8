"""The shipper process of a node: `python -m helixflow.launch.shipper`, started by the launcher.

Brings the journals of the node's gateways to the ledger, while they live and after.
"""

import asyncio
import signal
import sys
from collections.abc import Sequence
from typing import Final

import structlog
import uvloop

from helixflow.core.clock import SystemClock
from helixflow.core.errors import ExitCode, HelixError, UserError
from helixflow.launch.tasks import until_stopped
from helixflow.metering.ledger_client import LedgerClient
from helixflow.metering.node import read_node_id
from helixflow.metering.redis.closing import RedisJournalCloser
from helixflow.metering.shipping.figures import write_status
from helixflow.metering.shipping.journal import Office
from helixflow.metering.shipping.shipper import Shipper
from helixflow.pki.identity import ServiceIdentity
from helixflow.process.child import ChildArguments
from helixflow.rpc.channels import create_channel
from helixflow.rpc.sockets import socket_path
from helixflow.settings.tree import Settings
from helixflow.telemetry.logs import configure_logging

# The launcher gives the process two seconds more.
DRAIN_S: Final = 3.0
STATUS_S: Final = 1.0
# What could not be read of journals, for whoever wants to look at it.
QUARANTINE_NAME: Final = "quarantine"

log = structlog.get_logger("helixflow.shipper")


def main(argv: Sequence[str] | None = None) -> int:
    """Ships until SIGTERM. The exit code is one of `ExitCode`."""
    arguments = ChildArguments.parse(argv)
    arguments.arm()
    try:
        settings = arguments.load_settings()
        configure_logging(settings.log.level, settings.log.format, service=arguments.name or "shipper")
        uvloop.run(serve(settings, arguments))
    except UserError as exc:
        log.error("shipper.failed", reason=exc.message)
        return exc.exit_code
    except HelixError as exc:
        log.error("shipper.failed", reason=exc.message, exc_info=exc.__cause__)
        return ExitCode.UNAVAILABLE
    return ExitCode.OK


async def serve(settings: Settings, arguments: ChildArguments) -> None:
    """Ships until SIGTERM, then what is left, for at most `DRAIN_S`: the rest is shipped after the next start.

    Raises `UserError`, or `HelixError` when a task that must not end has ended.
    """
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    identity = await asyncio.to_thread(ServiceIdentity.open, settings, "shipper")
    node_id = await asyncio.to_thread(read_node_id, settings)
    quarantine = settings.journal_dir / QUARANTINE_NAME
    closer = await asyncio.to_thread(RedisJournalCloser, settings.redis) if settings.redis.url else None
    channel = create_channel(socket_path(settings.run_dir, "control"), identity, "auth")
    office = Office(
        node_id,
        LedgerClient(channel),
        closer,
        quarantine,
        settings.metering.ship_interval_s,
        settings.gateway.request_timeout_s,
    )
    shipper = Shipper(settings.journal_dir, office)
    shipping = asyncio.create_task(shipper.run(), name="shipping")
    tasks = [
        shipping,
        asyncio.create_task(identity.follow(), name="identity"),
        asyncio.create_task(_tell(shipper, settings), name="status"),
    ]
    try:
        arguments.report_ready()
        log.debug("shipper.ready", node=node_id)
        await until_stopped(stopping, tasks)
        shipper.drain()
        await asyncio.wait([shipping], timeout=DRAIN_S)
        if not shipping.done():
            left = await shipper.status(SystemClock().now())
            log.warning("shipper.left", journals=left.journals, backlog_bytes=left.backlog_bytes)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await channel.close()


async def _tell(shipper: Shipper, settings: Settings) -> None:
    """Writes `run/shipper.json`, where gateways find it for their metrics. A full disk does not keep it from shipping:
    that is what makes room again.
    """
    clock = SystemClock()
    failing = False
    while True:
        try:
            status = await shipper.status(clock.now())
            await asyncio.to_thread(write_status, settings.run_dir, status)
            failing = False
        except OSError as exc:
            if not failing:
                log.warning("status.failed", reason=exc.strerror)
            failing = True
        await asyncio.sleep(STATUS_S)


if __name__ == "__main__":
    sys.exit(main())
