"""`helixflow serve`: checks everything that can be checked, then becomes the launcher."""

import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Literal, NoReturn

import structlog

from helixflow.core.errors import ExitCode, UserError
from helixflow.engines.vllm.command import require_vllm
from helixflow.launch.launcher import CONTROL_SOCKETS, HTTPS_URL_NAME, SOCKET_NAME, URL_NAME
from helixflow.launch.lock import lock_data_dir
from helixflow.launch.ports import base_url, is_loopback, open_data_port, open_listeners
from helixflow.launch.provider_keys import check_keys
from helixflow.launch.pulling import pull_all
from helixflow.launch.serving_cache import write_cache
from helixflow.launch.serving_start import decide_serving
from helixflow.pki.files import PkiFolder
from helixflow.pki.issuing import NODE_SERVICES, ensure_pki
from helixflow.pool.catalogue import Catalogue
from helixflow.pool.plan import PlannedDeployment, plan_deployments
from helixflow.pool.store import ModelStore
from helixflow.rpc.sockets import check_port, prepare_run_dir, socket_path
from helixflow.settings.deployments import LlamaCppDeployment, VllmDeployment
from helixflow.settings.tree import Settings
from helixflow.telemetry.logs import configure_logging

log = structlog.get_logger("helixflow.serve")


def serve(settings: Settings, *, config: Path | None = None, welcome_argv: Sequence[str] | None = None) -> NoReturn:
    """Replaces this process by the launcher, keeping its pid. `config` is the file that is in use. `welcome_argv` is
    run once everything serves; a part `{base_url}` of it becomes the gateway's address.

    Raises `UserError` before anything was started: PORT_BUSY, CONFIG, STORAGE, MODEL, UNAVAILABLE (another `serve` has
    the data directory, or a model cannot be fetched).
    """
    configure_logging(settings.log.level, settings.log.format, service="serve")
    catalogue = Catalogue.load()
    settings, serving = decide_serving(settings, config, catalogue)
    planned = plan_deployments(settings, catalogue)
    check_binaries(planned)
    check_keys(settings.models)
    for name in (SOCKET_NAME, *CONTROL_SOCKETS):
        socket_path(settings.run_dir, name.removesuffix(".sock"))
    prepare_run_dir(settings.run_dir)
    lock_fd = lock_data_dir(settings.run_dir)
    check_port(settings.auth.host, settings.auth.port)
    check_port(settings.pool.host, settings.pool.port)
    listeners = open_listeners(settings.gateway)
    # Gateways of other nodes come to the engines here only where an address is meant for them.
    data_port = None if is_loopback(settings.pool.host) else open_data_port(settings.pool)
    ensure_pki(settings, NODE_SERVICES if data_port is None else (*NODE_SERVICES, "pool"))
    write_cache(settings, serving)
    # A port of 0 was a wish; what was got is what everybody must know.
    ports = {"http_port": listeners.http.getsockname()[1], "https_port": listeners.https.getsockname()[1]}
    gateway = settings.gateway.model_copy(update=ports)
    settings = settings.model_copy(update={"gateway": gateway})
    if data_port is not None:
        settings = with_data_port(settings, data_port)
    pull_for_start(settings, planned, applied=serving.was_applied)
    url, https_url = base_url(listeners.http), base_url(listeners.https, "https")
    (settings.run_dir / HTTPS_URL_NAME).write_text(https_url)
    # The last of both: who waits for it finds the other as well.
    (settings.run_dir / URL_NAME).write_text(url)
    _tell_trust(settings, https_url)
    welcome = [part.replace("{base_url}", url).replace("{https_url}", https_url) for part in welcome_argv or ()]
    opened = {"--listen-fd": listeners.http, "--tls-listen-fd": listeners.https}
    if data_port is not None:
        opened["--data-listen-fd"] = data_port
    become_launcher("node", settings, opened, lock_fd, welcome)


def pull_for_start(settings: Settings, planned: Sequence[PlannedDeployment], *, applied: bool = False) -> None:
    """Fetches what is to be loaded at once. Raises `UserError` as the store does.

    Of models that were `applied` while the node ran, one that cannot be had is no reason for not serving the others: it
    is logged, and the pool shows it as failed until it can.
    """
    # One name, one file: `plan_deployments` sees to it.
    wanted = {one.spec.name: one.spec for one in planned if one.spec is not None and one.settings.load == "start"}
    store = ModelStore(settings.models_dir)
    for spec in wanted.values():
        try:
            pull_all(store, (spec,))
        except UserError as exc:
            if not applied:
                raise
            log.error("model.not_fetched", model=spec.name, reason=exc.message, advice="the others are served")


def _tell_trust(settings: Settings, https_url: str) -> None:
    """How clients come to trust our own certificate; the operator's needs no words."""
    if settings.gateway.certificate_file is None:
        ca = PkiFolder(settings.pki_dir).ca_certificate
        log.info(
            "https.trust",
            curl=f"curl --cacert {quote(str(ca))} {https_url}/health",
            python=f"export SSL_CERT_FILE={quote(str(ca))}",
            others="helixflow pki show",
        )


def with_data_port(settings: Settings, listener: socket.socket) -> Settings:
    """The settings with the data port that was got."""
    pool = settings.pool.model_copy(update={"data_port": listener.getsockname()[1]})
    return settings.model_copy(update={"pool": pool})


def become_launcher(
    role: Literal["node", "pool"],
    settings: Settings,
    listeners: Mapping[str, socket.socket],
    lock_fd: int,
    welcome: Sequence[str] = (),
) -> NoReturn:
    """Replaces this process; `listeners` by the launcher's options."""
    opened = {option: listener.detach() for option, listener in listeners.items()}
    fds = {"--settings-fd": write_settings(settings), "--lock-fd": lock_fd, **opened}
    argv = [sys.executable, "-P", "-m", "helixflow.launch.launcher", "--role", role]
    for option, fd in fds.items():
        os.set_inheritable(fd, True)
        argv += [option, str(fd)]
    if welcome:
        argv += ["--on-ready", json.dumps(list(welcome))]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, argv)  # noqa: S606  (no shell is the point)


def write_settings(settings: Settings) -> int:
    """A descriptor of an unlinked file that holds the settings as JSON, with nothing to clean up.

    Secrets are in it only where the configuration has them in plain text (header values); keys that it names by file or
    variable are not. No other user can open it: it has no path, and mode 0600.
    """
    with tempfile.TemporaryFile() as file:
        file.write(settings.model_dump_json().encode())
        file.flush()
        return os.dup(file.fileno())


def check_binaries(planned: Sequence[PlannedDeployment]) -> None:
    """Raises `UserError` (CONFIG) for an engine of the operator's own that is not there."""
    for one in planned:
        if isinstance(one.settings, VllmDeployment):
            require_vllm(one.name, one.settings)
        binary = one.settings.binary if isinstance(one.settings, LlamaCppDeployment) else None
        if binary is not None and shutil.which(binary.expanduser()) is None:
            raise UserError(f"{one.name}: binary {binary} is not an executable file", ExitCode.CONFIG)
