"""`helixflow pool`: the pool of a node that has nothing else, checked and started."""

from typing import NoReturn

from helixflow.core.errors import ExitCode, UserError
from helixflow.launch.launcher import SOCKET_NAME
from helixflow.launch.lock import lock_data_dir
from helixflow.launch.ports import open_data_port
from helixflow.launch.serve import become_launcher, check_binaries, pull_for_start, with_data_port
from helixflow.launch.serving_cache import write_cache
from helixflow.launch.serving_start import decide_serving
from helixflow.pki.files import PkiFolder
from helixflow.pki.issuing import ensure_pki
from helixflow.pool.catalogue import Catalogue
from helixflow.pool.plan import plan_deployments
from helixflow.rpc.sockets import check_port, prepare_run_dir, socket_path
from helixflow.settings.tree import Settings
from helixflow.telemetry.logs import configure_logging

SERVICES = ("pool",)


def serve_pool(settings: Settings) -> NoReturn:
    """Replaces this process by the launcher, keeping its pid.

    Raises `UserError` before anything was started: PORT_BUSY, CONFIG, STORAGE, MODEL, UNAVAILABLE (another process has
    the data directory, or a model cannot be fetched).
    """
    configure_logging(settings.log.level, settings.log.format, service="pool")
    catalogue = Catalogue.load()
    settings, serving = decide_serving(settings, None, catalogue)
    planned = plan_deployments(settings, catalogue)
    check_binaries(planned)
    _check_fleet(settings)
    for name in (SOCKET_NAME, "pool.sock"):
        socket_path(settings.run_dir, name.removesuffix(".sock"))
    prepare_run_dir(settings.run_dir)
    lock_fd = lock_data_dir(settings.run_dir)
    check_port(settings.pool.host, settings.pool.port)
    data_port = open_data_port(settings.pool)
    ensure_pki(settings, SERVICES)
    write_cache(settings, serving)
    settings = with_data_port(settings, data_port)
    pull_for_start(settings, planned)
    become_launcher("pool", settings, {"--data-listen-fd": data_port}, lock_fd)


def _check_fleet(settings: Settings) -> None:
    """Nobody could use a pool that nobody learns of, or whose authority is its own."""
    if not settings.pool.control:
        raise UserError(
            "a pool alone registers with the auth service of its fleet: give its host:port with --control, "
            "pool.control in the configuration or HELIXFLOW_POOL__CONTROL",
            ExitCode.CONFIG,
        )
    folder = PkiFolder(settings.pki_dir)
    if not folder.ca_certificate.exists():
        raise UserError(
            f"{folder.ca_certificate}: there is no such file; where the auth service runs, run: helixflow pki issue "
            f"pool --out pool.pem, and copy that to {folder.service_file('pool')} and its ca.crt here",
            ExitCode.CONFIG,
        )
