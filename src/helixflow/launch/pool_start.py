"""`helixflow pool`: the pool of a node that has nothing else, checked and started."""

from typing import NoReturn

from helixflow.core.errors import ExitCode, UserError
from helixflow.launch.launcher import SOCKET_NAME
from helixflow.launch.lock import lock_data_dir
from helixflow.launch.ports import open_data_port
from helixflow.launch.serve import become_launcher, check_binaries, with_data_port
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

    Models are those that the fleet's auth service says, once it was reached; until then those that it said last, or
    those of the configuration, if it has any. They are fetched by the pool, which others see at it.

    Raises `UserError` before anything was started: PORT_BUSY, CONFIG, STORAGE, UNAVAILABLE (another process has the
    data directory).
    """
    configure_logging(settings.log.level, settings.log.format, service="pool")
    catalogue = Catalogue.load()
    if "models" not in settings.model_fields_set:
        # The default ones are for a node that nobody tells what to serve.
        settings = settings.model_copy(update={"models": ()})
    settings, serving = decide_serving(settings, None, catalogue)
    check_binaries(plan_deployments(settings, catalogue))
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
    needed = [folder.ca_certificate]
    if not folder.ca_key.exists():
        needed.append(folder.service_file("pool"))  # else it is issued here
    missing = next((path for path in needed if not path.exists()), None)
    if missing is not None:
        raise UserError(
            f"{missing}: there is no such file; on the node of the auth service run: helixflow pki issue "
            f"pool --out pool.pem; copy that here as {folder.service_file('pool')} (mode 600), and its ca.crt as "
            f"{folder.ca_certificate}",
            ExitCode.CONFIG,
        )
