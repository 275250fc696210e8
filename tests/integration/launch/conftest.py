"""A real launcher with stand-ins for control, gateway and shipper, and proof that no process is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from helixflow.settings.models import ModelSettings
from helixflow.settings.tree import GatewaySettings, LogSettings, Settings
from tests.harness.node import command_of

MARK = "HFTEST_MARK"
WAIT_S = 60.0

# What a process of ours does as far as the launcher can see. How it misbehaves is said in a file.
SERVICE = """
import os, pathlib, signal, socket, sys, time
from helixflow.process.child import ChildArguments
arguments = ChildArguments.parse()
arguments.arm()
here = pathlib.Path(__file__).parent
behaviour = here / f"{arguments.name}.behaviour"
word = behaviour.read_text() if behaviour.exists() else ""
with (here / f"{arguments.name}.pids").open("a") as file:
    file.write(f"{os.getpid()}\\n")
if word.startswith("exit"):
    sys.exit(int(word.split()[1]))
if word == "stubborn":
    signal.signal(signal.SIGTERM, lambda *_: (here / "asked").touch())
arguments.report_ready()
if arguments.listen_fd is not None:
    listener = socket.socket(fileno=arguments.listen_fd)
    listener.settimeout(None)
    while True:
        peer, _ = listener.accept()
        peer.sendall(str(os.getpid()).encode())
        peer.close()
while True:
    time.sleep(3600)
"""

LAUNCHER = """
import json, os, sys
from dataclasses import replace
from helixflow.launch.launcher import Launcher, LauncherOptions
from helixflow.process.record import RecordLog
settings_fd, listen_fd, welcome = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
options = replace(
    LauncherOptions.read(settings_fd, listen_fd),
    control_module="service", gateway_module="service", shipper_module="service",
)
log = RecordLog(sys.stderr, level=options.log_level, format="json", service="launcher")
sys.exit(Launcher(options, log, os.environ, welcome).run())
"""


def until(condition: Callable[[], Any], seconds: float = WAIT_S) -> Any:
    """Polls other processes' state, which nothing announces; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def marked(mark: str) -> list[psutil.Process]:
    """The live processes of one test, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Marks all processes that the test starts; fails the test if one outlives it (and ends it)."""
    value = uuid.uuid4().hex
    monkeypatch.setenv(MARK, value)
    yield value
    left = [process for process in marked(value) if process.pid != os.getpid()]
    names = [" ".join(command_of(process)) for process in left]
    for process in left:
        process.kill()
    assert not names, f"left behind: {names}"


class Peer:
    """A connection to the launcher's socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(WAIT_S)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        self._events: list[dict[str, Any]] = []

    def send(self, line: bytes) -> None:
        self._socket.sendall(line)

    def receive(self) -> dict[str, Any]:
        line = self._file.readline()
        assert line, "the launcher hung up"
        message: dict[str, Any] = json.loads(line)
        return message

    def is_hung_up_on(self) -> bool:
        try:
            return self._file.readline() == b""
        except ConnectionResetError:
            return True

    def ask(self, **request: Any) -> dict[str, Any]:
        self.send(json.dumps({"id": 1, **request}).encode() + b"\n")
        while "event" in (message := self.receive()):
            self._events.append(message)
        return message

    def start(self, name: str, code: str, **more: Any) -> dict[str, Any]:
        """Starts a Python program as an engine."""
        return self.ask(op="start", name=name, argv=[sys.executable, "-u", "-c", code], **more)

    def exit_of(self, name: str) -> dict[str, Any]:
        while True:
            for event in self._events:
                if event["name"] == name:
                    return event
            message = self.receive()
            assert message.get("event") == "exited"
            self._events.append(message)

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Running:
    """A launcher under test."""

    def __init__(self, folder: Path, mark: str, welcome: list[str], models: tuple[ModelSettings, ...] = ()) -> None:
        self.folder = folder
        self.mark = mark
        self.settings = Settings(
            data_dir=folder,
            gateway=GatewaySettings(drain_timeout_s=20),
            log=LogSettings(level="debug"),
            models=models,
        )
        self.settings.run_dir.mkdir(mode=0o700)
        (folder / "service.py").write_text(SERVICE)
        self.log_path = folder / "log"
        self._peers: list[Peer] = []
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        with tempfile.TemporaryFile() as settings_file, self.log_path.open("wb") as log, listener:
            settings_file.write(self.settings.model_dump_json().encode())
            settings_file.flush()
            fds = (settings_file.fileno(), listener.fileno())
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCHER, str(fds[0]), str(fds[1]), json.dumps(welcome)],
                pass_fds=fds,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(folder), MARK: mark, "HELIXFLOW_BOOTSTRAP_API_KEY": "hfk_x"},
                start_new_session=True,
            )

    @property
    def socket_path(self) -> Path:
        return self.settings.run_dir / "launcher.sock"

    def behave(self, service: str, word: str) -> None:
        (self.folder / f"{service}.behaviour").write_text(word)

    def pids(self, service: str) -> list[int]:
        path = self.folder / f"{service}.pids"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def wait_serving(self) -> "Running":
        until(lambda: {"control", "gateway-0", "shipper"} <= {r.get("process") for r in self.records("process.ready")})
        return self

    def records(self, event: str) -> list[dict[str, Any]]:
        found = []
        for line in self.log_path.read_text().splitlines(keepends=True):
            if line.startswith("{") and line.endswith("\n"):
                record = json.loads(line)
                if record["event"] == event:
                    found.append(record)
        return found

    def connect(self) -> Peer:
        until(self.socket_path.exists)
        peer = Peer(self.socket_path)
        self._peers.append(peer)
        return peer

    def call(self) -> int:
        """What the gateway behind the listening socket answers: its process id."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S) as client:
            return int(client.recv(32))

    def wait(self) -> int:
        return self.process.wait(WAIT_S)

    def others(self) -> list[psutil.Process]:
        return [process for process in marked(self.mark) if process.pid not in (self.process.pid, os.getpid())]

    def close(self) -> None:
        for peer in self._peers:
            peer.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait(WAIT_S)
        until(lambda: not self.others())


@pytest.fixture
def start_launcher(tmp_path: Path, mark: str) -> Iterator[Callable[..., Running]]:
    """Starts launchers; `behaviours` says how a service misbehaves, before it is started."""
    started: list[Running] = []

    def start(welcome: list[str] | None = None, models: tuple[ModelSettings, ...] = (), **behaviours: str) -> Running:
        folder = tmp_path / f"node{len(started)}"
        folder.mkdir()
        for service, word in behaviours.items():
            (folder / f"{service.replace('gateway', 'gateway-0')}.behaviour").write_text(word)
        started.append(Running(folder, mark, welcome or [], models))
        return started[-1]

    yield start
    for running in started:
        running.close()


@pytest.fixture
def launcher(start_launcher: Callable[..., Running]) -> Running:
    return start_launcher().wait_serving()
