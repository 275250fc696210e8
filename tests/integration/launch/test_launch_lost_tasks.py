"""A background task that dies takes its process with it, and says so: nothing serves on with old keys and views."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helixflow.core.errors import ExitCode
from helixflow.launch.serve import write_settings
from helixflow.pki.issuing import ensure_pki
from helixflow.rpc.sockets import prepare_run_dir
from helixflow.settings.serving import PoolSettings
from helixflow.settings.tree import AuthSettings, LogSettings, Settings

WAIT_S = 60.0
# In place of a task of the process: what a full disk or a fault of ours does to it.
PROGRAM = """
import sys
from {module} import {owner}
async def die(self):
    raise OSError(28, "No space left on device")
{owner}.{method} = die
from helixflow.launch.{process} import main
sys.exit(main())
"""
AUTH = """
import os, sys
from helixflow.core.errors import UserError
from helixflow.pki.identity import ServiceIdentity
from helixflow.process.child import ChildArguments
from helixflow.launch.auth import serve_auth
async def die(self):
    raise OSError(28, "No space left on device")
ServiceIdentity.follow = die
try:
    serve_auth(ChildArguments.parse().load_settings(), None)
except UserError as exc:
    sys.exit(int(exc.exit_code))
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(
        data_dir=tmp_path,
        auth=AuthSettings(port=0),
        pool=PoolSettings(port=0),
        log=LogSettings(level="info", format="json"),
    )
    prepare_run_dir(settings.run_dir)
    ensure_pki(settings)
    return settings


def run(settings: Settings, program: str, **sockets: socket.socket) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and log of a process that runs `program`."""
    settings_fd = write_settings(settings)
    fds = {"--settings-fd": settings_fd, **{f"--{name}-fd": one.fileno() for name, one in sockets.items()}}
    argv = [sys.executable, "-c", program]
    for option, fd in fds.items():
        argv += [option.replace("_", "-"), str(fd)]
    ended = subprocess.run(argv, pass_fds=fds.values(), capture_output=True, text=True, timeout=WAIT_S, check=False)
    return ended.returncode, [json.loads(line) for line in ended.stderr.splitlines() if line.startswith("{")]


def failure(records: list[dict[str, Any]], event: str) -> dict[str, Any]:
    (record,) = (record for record in records if record["event"] == event)
    assert record["level"] == "error"
    assert "No space left on device" in json.dumps(record)
    return record


@pytest.mark.parametrize(
    ("module", "owner", "method", "name"),
    [
        ("helixflow.pki.contexts", "ServerContext", "follow", "https certificate"),
        ("helixflow.clients.changes", "ChangeWatch", "run", "changes"),
        ("helixflow.gateway.server", "GatewayServer", "run", "housekeeping"),
    ],
)
def test_a_gateway_ends_with_its_tasks(settings: Settings, module: str, owner: str, method: str, name: str) -> None:
    program = PROGRAM.format(process="gateway", module=module, owner=owner, method=method)
    with socket.create_server(("127.0.0.1", 0)) as plain, socket.create_server(("127.0.0.1", 0)) as tls:
        status, records = run(settings, program, listen=plain, tls_listen=tls)
    assert status == ExitCode.UNAVAILABLE
    assert f"'{name}'" in failure(records, "gateway.failed")["reason"]


def test_control_ends_with_its_tasks(settings: Settings) -> None:
    program = PROGRAM.format(process="control", module="helixflow.pki.renewal", owner="Renewal", method="run")
    with socket.socket(socket.AF_UNIX) as launcher:
        launcher.bind(str(settings.run_dir / "launcher.sock"))
        launcher.listen()
        status, records = run(settings, program)
    assert status == ExitCode.UNAVAILABLE
    assert "'renewal'" in failure(records, "control.failed")["reason"]


def test_auth_alone_ends_with_its_tasks(settings: Settings) -> None:
    status, records = run(settings, AUTH)
    assert status == ExitCode.UNAVAILABLE
    failure(records, "auth.failed")
    assert [path.name for path in settings.run_dir.iterdir()] == ["serve.lock"]
