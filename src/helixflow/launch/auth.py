"""`helixflow auth`: the auth service and the admin API alone, in the foreground."""

import asyncio
import signal
from pathlib import Path

import structlog
import uvloop

from helixflow.console.server import SOCKET_NAME
from helixflow.core.errors import ExitCode, HelixError, UserError
from helixflow.launch.auth_node import AuthNode
from helixflow.launch.lock import lock_data_dir
from helixflow.launch.serving_cache import write_cache
from helixflow.launch.serving_start import decide_serving
from helixflow.launch.tasks import until_stopped
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.issuing import ensure_pki
from helixflow.pki.renewal import Renewal
from helixflow.pool.catalogue import Catalogue
from helixflow.pool.registration import Registry
from helixflow.rpc.sockets import check_port, prepare_run_dir, socket_path
from helixflow.settings.tree import Settings
from helixflow.telemetry.logs import configure_logging

SERVICES = ("auth", "console", "monitoring")

log = structlog.get_logger("helixflow.auth")


def serve_auth(settings: Settings, bootstrap_key: str | None, config: Path | None = None) -> None:
    """Serves until SIGTERM or SIGINT. Raises `UserError`: STORAGE, CONFIG, PORT_BUSY, UNAVAILABLE."""
    configure_logging(settings.log.level, settings.log.format, service="auth")
    settings, serving = decide_serving(settings, config, Catalogue.load())
    for name in ("control", SOCKET_NAME):
        socket_path(settings.run_dir, name)
    prepare_run_dir(settings.run_dir)
    lock_data_dir(settings.run_dir)
    check_port(settings.auth.host, settings.auth.port)
    ensure_pki(settings, SERVICES)
    write_cache(settings, serving)
    try:
        uvloop.run(_serve_until_signalled(settings, bootstrap_key))
    except HelixError as exc:
        log.error("auth.failed", reason=exc.message, exc_info=exc.__cause__)
        raise UserError(exc.message, ExitCode.UNAVAILABLE) from exc


async def _serve_until_signalled(settings: Settings, bootstrap_key: str | None) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    # One task, so that a signal also ends a start that waits for its database.
    serving = asyncio.create_task(_serve(settings, bootstrap_key), name="auth")
    try:
        await until_stopped(stopping, [serving])
    finally:
        serving.cancel()
        await asyncio.wait({serving})
    if not serving.cancelled():
        serving.result()


async def _serve(settings: Settings, bootstrap_key: str | None) -> None:
    """Until cancelled. Raises what keeps it from serving."""
    identity = await asyncio.to_thread(ServiceIdentity.open, settings, "auth")
    node = AuthNode(settings, identity, bootstrap_key, Registry())
    try:
        await node.start()
        async with asyncio.TaskGroup() as tasks:
            for upkeep in (node.run(), identity.follow(), Renewal(settings).run()):
                tasks.create_task(upkeep)
    finally:
        await node.close()
