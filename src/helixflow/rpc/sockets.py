"""The Unix sockets of running services: one file a service, in a folder that only their owner can enter. And ports."""

import errno
import os
import socket
import stat
import sys
from pathlib import Path

from helixflow.core.errors import ExitCode, UserError

# sizeof(sun_path) less the terminating NUL.
MAX_PATH_BYTES = 103 if sys.platform == "darwin" else 107
_PROBE_TIMEOUT_S = 1.0


def socket_path(run_dir: Path, service: str) -> Path:
    """Where `service` listens. Raises `UserError` (CONFIG) when the operating system cannot take so long a path."""
    path = run_dir / f"{service}.sock"
    excess = len(os.fsencode(path)) - MAX_PATH_BYTES
    if excess > 0:
        message = f"{path}: too long for a Unix socket by {excess} bytes; choose a shorter data_dir"
        raise UserError(message, ExitCode.CONFIG)
    return path


def prepare_run_dir(run_dir: Path) -> None:
    """Creates the folder with mode 0700, or makes sure that it is its owner's alone.

    Raises `UserError`: CONFIG when others could put a socket there, STORAGE when it cannot be made.
    """
    try:
        run_dir.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        run_dir.mkdir(mode=0o700, exist_ok=True)
        found = run_dir.lstat()
        if found.st_uid != os.geteuid():
            raise UserError(
                f"{run_dir}: belongs to another user; remove it or choose another data_dir", ExitCode.CONFIG
            )
        if stat.S_ISLNK(found.st_mode):
            raise UserError(f"{run_dir}: is a symbolic link; remove it or choose another data_dir", ExitCode.CONFIG)
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            message = f"{run_dir}: other users can write there; run chmod 700 {run_dir} after a look at what it holds"
            raise UserError(message, ExitCode.CONFIG)
        run_dir.chmod(0o700)
    except OSError as exc:
        raise UserError(f"{run_dir}: cannot be prepared: {exc.strerror}", ExitCode.STORAGE) from exc


def clear_stale_socket(path: Path) -> None:
    """Removes a socket file that nobody listens on; without one it does nothing.

    Raises `UserError`: PORT_BUSY when a process listens there, STORAGE when something else is in the way.
    gRPC itself removes any socket at the path that it binds, a live one too: ask here first. Connects with a short
    deadline, so call it from a thread.
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UserError(f"{path}: is in the way of a socket; remove it", ExitCode.STORAGE)
        if is_listening(path):
            raise UserError(f"{path}: another HelixFlow serves this data_dir already", ExitCode.PORT_BUSY)
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as exc:
        raise UserError(f"{path}: cannot be replaced: {exc.strerror}", ExitCode.STORAGE) from exc


def is_listening(path: Path) -> bool:
    """Whether a process accepts connections at `path`. A full backlog counts as yes: somebody owns it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except (TimeoutError, BlockingIOError):
            return True
    return True


def check_port(host: str, port: int) -> None:
    """Whether a TCP port can be bound: gRPC does not tell why it cannot, so the operating system is asked first.

    Raises `UserError`: PORT_BUSY when another program has it, CONFIG when this machine has no such address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as exc:
        if isinstance(exc, socket.gaierror):
            raise UserError(f"{host}: there is no such address", ExitCode.CONFIG) from exc
        if exc.errno == errno.EADDRINUSE:
            message = f"{host} port {port}: another program listens there; stop it or choose another port"
            raise UserError(message, ExitCode.PORT_BUSY) from exc
        raise UserError(f"{host} port {port}: {os.strerror(exc.errno or 0)}", ExitCode.CONFIG) from exc
