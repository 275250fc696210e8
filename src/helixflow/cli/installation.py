"""Checks of the installation: engine, services, port, data directory, model files."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from helixflow.cli.findings import Finding
from helixflow.cli.output import format_size
from helixflow.core.errors import UserError

if TYPE_CHECKING:
    from helixflow.pool.plan import PlannedDeployment
    from helixflow.settings.tree import Settings

_ENGINE_TIMEOUT_S: Final = 60.0
_HEALTH_TIMEOUT_S: Final = 3.0
# Loading it here would bring a native library into this process.
_ENGINE_PROGRAM: Final = "import importlib.metadata, xllamacpp; print(importlib.metadata.version('xllamacpp'))"


@dataclass(frozen=True, slots=True)
class ServiceFinding(Finding):
    """`running`: a service of this data directory answers or at least holds its socket."""

    running: bool = False


def plan(settings: "Settings") -> "tuple[PlannedDeployment, ...]":
    """The deployments that this machine would run. Raises `UserError` (CONFIG)."""
    from helixflow.pool.catalogue import Catalogue
    from helixflow.pool.plan import fill_from_catalogue, plan_deployments

    catalogue = Catalogue.load()
    return plan_deployments(fill_from_catalogue(settings, catalogue), catalogue)


def check_engine() -> Finding:
    advice = "Install it again: pip install --force-reinstall xllamacpp"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _ENGINE_PROGRAM],
            capture_output=True,
            text=True,
            timeout=_ENGINE_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return Finding("engine", "problem", f"llama.cpp cannot be tried: {exc}", advice)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
        return Finding("engine", "problem", f"llama.cpp (xllamacpp) cannot be loaded: {reason}", advice)
    return Finding("engine", "ok", f"llama.cpp (xllamacpp {done.stdout.strip()})")


def check_services(settings: "Settings") -> ServiceFinding:
    """Whether the services of this data directory run and say that they are well."""
    from helixflow.rpc.sockets import is_listening, socket_path

    try:
        path = socket_path(settings.run_dir, "control")
        if not is_listening(path):
            return ServiceFinding("services", "ok", "not running (start them with: helixflow serve)")
    except UserError as exc:
        return ServiceFinding("services", "problem", exc.message, "Choose a shorter data_dir.")
    except OSError as exc:
        advice = "Run this as the user that runs the service."
        return ServiceFinding("services", "problem", f"{settings.run_dir}: {exc.strerror}", advice)
    reason = _ask_health(settings, path)
    if reason:
        advice = "Look at the service's log; if it goes on, restart helixflow serve."
        return ServiceFinding("services", "problem", f"the control process is not well: {reason}", advice, running=True)
    return ServiceFinding("services", "ok", f"running, control answers on {path}", running=True)


def check_port(settings: "Settings", *, running: bool) -> Finding:
    host, port = settings.gateway.host, settings.gateway.http_port
    where = f"{host} port {port}"
    if port == 0:
        return Finding("port", "ok", "a free one is taken at every start")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except PermissionError:
            return Finding("port", "problem", f"{where} needs more rights", "Choose gateway.http_port above 1023.")
        except OSError as exc:
            holder, launcher = _holder(port)
            if running and launcher:
                return Finding("port", "ok", f"{where} is held by {holder}")
            advice = "Stop that program, or choose another port with gateway.http_port."
            return Finding("port", "problem", f"{where}: {exc.strerror}; held by {holder}", advice)
    return Finding("port", "ok", f"{where} is free")


def check_data_dir(settings: "Settings", planned: "Sequence[PlannedDeployment]") -> Finding:
    """Writable, and with room for what is still to be fetched. Looks only: nothing is created."""
    from helixflow.pool.store import ModelStore

    folder = settings.data_dir
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        advice = f"Give yourself the right to write to {existing}, or choose another data_dir."
        return Finding("data_dir", "problem", f"{folder}: {existing} is not a folder that you can write to", advice)
    store = ModelStore(settings.models_dir)
    specs = {one.spec.name: one.spec for one in planned if one.spec is not None}
    missing = [spec for name, spec in specs.items() if store.find(name) is None]
    needed = sum(spec.disk_bytes or spec.size_bytes for spec in missing)
    free = shutil.disk_usage(existing).free
    text = f"{folder}, {format_size(free)} free"
    if needed > free:
        text += f"; models to be fetched need {format_size(needed)}"
        return Finding("data_dir", "problem", text, "Free some space, or choose a data_dir on a larger disk.")
    return Finding("data_dir", "ok", text + ("" if folder.exists() else " (made at the first start)"))


def check_models(settings: "Settings", planned: "Sequence[PlannedDeployment]") -> list[Finding]:
    """The file of each configured model, read whole and compared with its SHA-256."""
    from helixflow.pool.disk import hash_file
    from helixflow.pool.store import ModelStore

    store = ModelStore(settings.models_dir)
    findings = []
    for name in dict.fromkeys(one.spec.name for one in planned if one.spec is not None):
        stored = store.find(name)
        if stored is None:
            text = "not on disk; it is fetched when it is first needed"
            findings.append(Finding(f"model {name}", "ok", text, f"To fetch it now: helixflow models pull {name}"))
            continue
        again = f"Fetch it again: helixflow models rm --yes {name} && helixflow models pull {name}"
        try:
            sha256 = hash_file(stored.path, lambda _done: None)
        except OSError as exc:
            text = f"{stored.path}: {exc.strerror}"
            findings.append(Finding(f"model {name}", "problem", text, "Make the file readable to you."))
            continue
        if sha256 != stored.sha256:
            findings.append(Finding(f"model {name}", "problem", f"{stored.path}: the file is damaged", again))
        else:
            findings.append(Finding(f"model {name}", "ok", f"{format_size(stored.size_bytes)}, SHA-256 as expected"))
    return findings


def _ask_health(settings: "Settings", path: Path) -> str:
    """Why the service on `path` is not well; empty when it is."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

    from helixflow.pki.identity import ServiceIdentity
    from helixflow.rpc.channels import create_blocking_channel

    try:
        identity = ServiceIdentity.open(settings, "monitoring")
    except UserError as exc:
        return exc.message
    with create_blocking_channel(path, identity, "auth") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_TIMEOUT_S)
        except grpc.RpcError as exc:
            code = getattr(exc, "code", None)
            return str(code().name).lower().replace("_", " ") if callable(code) else "no answer"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)).lower()


def _holder(port: int) -> tuple[str, bool]:
    """Who listens on `port`, as far as the system tells us, and whether it is a launcher of ours."""
    import psutil

    try:
        for connection in psutil.net_connections(kind="tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid:
                process = psutil.Process(connection.pid)
                command = process.cmdline()
                ours = any(part.startswith("helixflow.launch.") for part in command)
                return f"{'helixflow' if ours else process.name()} (process {connection.pid})", ours
    except psutil.Error:
        # macOS tells only root; a process may end while it is looked at.
        pass
    return "another program (its owner is not visible to you)", False
