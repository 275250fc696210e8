"""`helixflow auth`: the auth service and the admin API alone, in the foreground."""

import asyncio
import signal

import structlog
import uvloop

from helixflow.launch.auth_node import AuthNode
from helixflow.launch.lock import lock_data_dir
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.issuing import ensure_pki
from helixflow.pki.renewal import Renewal
from helixflow.rpc.sockets import prepare_run_dir
from helixflow.settings.tree import Settings
from helixflow.telemetry.logs import configure_logging

SERVICES = ("auth", "console", "monitoring")

log = structlog.get_logger("helixflow.auth")


def serve_auth(settings: Settings, bootstrap_key: str | None) -> None:
    """Serves until SIGTERM or SIGINT. Raises `UserError`: STORAGE, CONFIG, PORT_BUSY, UNAVAILABLE."""
    configure_logging(settings.log.level, settings.log.format, service="auth")
    prepare_run_dir(settings.run_dir)
    lock_data_dir(settings.run_dir)
    ensure_pki(settings, SERVICES)
    uvloop.run(_serve(settings, bootstrap_key))


async def _serve(settings: Settings, bootstrap_key: str | None) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    identity = await asyncio.to_thread(ServiceIdentity.open, settings, "auth")
    node = AuthNode(settings, identity, bootstrap_key)
    try:
        await node.start()
        log.info("auth.serving", host=settings.auth.host, port=node.port)
        async with asyncio.TaskGroup() as tasks:
            upkeep = [tasks.create_task(run) for run in (node.run(), identity.follow(), Renewal(settings).run())]
            await stopping.wait()
            for task in upkeep:
                task.cancel()
    finally:
        await node.close()
