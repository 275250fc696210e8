"""`helixflow serve`: checks everything that can be checked, then becomes the launcher."""

import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from helixflow.core.errors import ExitCode, UserError
from helixflow.launch.launcher import CONTROL_SOCKET_NAME, SOCKET_NAME, URL_NAME
from helixflow.launch.ports import base_url, open_listener
from helixflow.launch.pulling import pull_all
from helixflow.pki.issuing import ensure_pki
from helixflow.pool.catalogue import Catalogue
from helixflow.pool.plan import PlannedDeployment, fill_from_catalogue, plan_deployments
from helixflow.pool.store import ModelStore
from helixflow.rpc.sockets import prepare_run_dir, socket_path
from helixflow.settings.tree import Settings
from helixflow.telemetry.logs import configure_logging

LOCK_NAME: Final = "serve.lock"


def serve(settings: Settings, *, welcome_argv: Sequence[str] | None = None) -> NoReturn:
    """Replaces this process by the launcher, keeping its pid. `welcome_argv` is run once everything serves; a part
    `{base_url}` of it becomes the gateway's address.

    Raises `UserError` before anything was started: PORT_BUSY, CONFIG, STORAGE, MODEL, UNAVAILABLE (another `serve` has
    the data directory, or a model cannot be fetched).
    """
    configure_logging(settings.log.level, settings.log.format, service="serve")
    catalogue = Catalogue.load()
    settings = fill_from_catalogue(settings, catalogue)
    planned = plan_deployments(settings, catalogue)
    _check_binaries(planned)
    for name in (SOCKET_NAME, CONTROL_SOCKET_NAME):
        socket_path(settings.run_dir, name.removesuffix(".sock"))
    prepare_run_dir(settings.run_dir)
    lock_fd = _lock(settings.run_dir / LOCK_NAME)
    ensure_pki(settings)
    listener = open_listener(settings.gateway)
    # A port of 0 was a wish; what was got is what everybody must know.
    port = listener.getsockname()[1]
    gateway = settings.gateway.model_copy(update={"http_port": port})
    settings = settings.model_copy(update={"gateway": gateway})
    # One name, one file: `plan_deployments` sees to it.
    wanted = {one.spec.name: one.spec for one in planned if one.settings.load == "start"}
    pull_all(ModelStore(settings.models_dir), wanted.values())
    (settings.run_dir / URL_NAME).write_text(base_url(listener))
    welcome = [part.replace("{base_url}", base_url(listener)) for part in welcome_argv or ()]
    _become_launcher(settings, listener.detach(), lock_fd, welcome)


def _become_launcher(settings: Settings, listen_fd: int, lock_fd: int, welcome: Sequence[str]) -> NoReturn:
    settings_fd = write_settings(settings)
    argv = [sys.executable, "-P", "-m", "helixflow.launch.launcher"]
    for option, fd in (("--settings-fd", settings_fd), ("--listen-fd", listen_fd), ("--lock-fd", lock_fd)):
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


def _lock(path: Path) -> int:
    """Takes the data directory for as long as the process lives. Raises `UserError` when another has it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise UserError(f"{path}: cannot be opened: {exc.strerror}", ExitCode.STORAGE) from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        who = f" (process {holder})" if holder else ""
        raise UserError(
            f"helixflow serve{who} runs already with data_dir {path.parent.parent}; stop it or choose another one",
            ExitCode.UNAVAILABLE,
        ) from exc
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _check_binaries(planned: Sequence[PlannedDeployment]) -> None:
    for one in planned:
        binary = one.settings.binary
        if binary is not None and shutil.which(binary.expanduser()) is None:
            raise UserError(f"{one.name}: binary {binary} is not an executable file", ExitCode.CONFIG)
