"""`helixflow serve` from its first check to its last process, with the real control, gateway and engine."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from helixflow.core.errors import ExitCode
from helixflow.pool.manifest import StoredModel
from helixflow.settings.deployments import LlamaCppDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.tree import GatewaySettings, LogSettings, Settings
from tests.harness.node import command_of
from tests.integration.launch.conftest import WAIT_S, marked, until

SERVE = """
import sys
from helixflow.core.errors import UserError
from helixflow.launch.serve import serve
from helixflow.settings.tree import Settings
try:
    settings = Settings.model_validate_json(sys.argv[1])
    serve(settings, welcome_argv=["/bin/sh", "-c", f"echo {{base_url}} > {sys.argv[2]}"])
except UserError as error:
    print(error.message)
    sys.exit(error.exit_code)
"""
SERVE_GRACE_S = 60


class Node:
    """One `serve` with its data directory."""

    def __init__(self, folder: Path, mark: str, model: Path, port: int = 0) -> None:
        self._mark = mark
        self.data_dir = folder
        self.url_file = folder.parent / "url"
        deployment = LlamaCppDeployment(engine="llama_cpp", source=f"file:{model}", context=512, parallel=2)
        self.settings = Settings(
            data_dir=folder,
            gateway=GatewaySettings(http_port=port, drain_timeout_s=5),
            log=LogSettings(level="debug", format="json"),
            models=(ModelSettings(name="m", deployments=(deployment,)),),
        )
        self.log = (folder.parent / "serve.log").open("wb")
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        return [sys.executable, "-c", SERVE, self.settings.model_dump_json(), str(self.url_file)]

    def start(self) -> "Node":
        self.process = subprocess.Popen(self.command(), stderr=self.log, start_new_session=True)
        until(lambda: self.url_file.exists() and self.url_file.read_text().endswith("\n"))
        return self

    def wait_ready(self) -> "Node":
        until(lambda: self.status("/readyz") == 200)
        return self

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self.url_file.read_text().strip() + path, timeout=WAIT_S) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def chat(self) -> dict[str, object]:
        body = {"model": "m", "max_tokens": 4, "messages": [{"role": "user", "content": "Say hello."}]}
        request = urllib.request.Request(
            self.url_file.read_text().strip() + "/v1/chat/completions",
            json.dumps(body).encode(),
            {
                "content-type": "application/json",
                "authorization": f"Bearer {(self.data_dir / 'bootstrap.key').read_text().strip()}",
            },
        )
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            content: dict[str, object] = json.load(answer)
        return content

    def children(self) -> list[psutil.Process]:
        return [process for process in marked(self._mark) if process.pid != os.getpid()]

    def close(self) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
            self.process.wait(SERVE_GRACE_S)
            until(lambda: not self.children())
        self.log.close()


@pytest.fixture
def make_node(tmp_path: Path, mark: str, chat_model: StoredModel) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def make(port: int = 0) -> Node:
        nodes.append(Node(tmp_path / "data", mark, chat_model.path, port))
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()


def test_a_real_answer_and_a_clean_end(make_node: Callable[..., Node]) -> None:
    node = make_node().start().wait_ready()
    assert node.process is not None
    assert node.chat()["object"] == "chat.completion"
    launcher = psutil.Process(node.process.pid)
    assert "helixflow.launch.launcher" in launcher.cmdline(), "serve became the launcher, with the same pid"
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(SERVE_GRACE_S) == 0
    until(lambda: not node.children())
    assert [path.name for path in (node.data_dir / "run").iterdir()] == ["serve.lock"]


def test_killing_the_launcher_leaves_no_process_and_the_next_start_works(make_node: Callable[..., Node]) -> None:
    node = make_node().start().wait_ready()
    assert node.process is not None
    # Launcher, control, gateway, shipper, engine; and the welcome is over.
    until(lambda: len(node.children()) == 5)
    node.process.kill()
    node.process.wait(SERVE_GRACE_S)
    until(lambda: not node.children())
    node.url_file.unlink()
    node.start().wait_ready()


def test_requests_go_on_after_control_was_killed(make_node: Callable[..., Node]) -> None:
    node = make_node().start().wait_ready()
    node.chat()
    engine = _find(node, "llama_cpp.child")
    _find(node, "launch.control").kill()
    assert node.chat()["object"] == "chat.completion"
    until(lambda: b'"event": "replica.adopted"' in (node.data_dir.parent / "serve.log").read_bytes())
    assert _find(node, "llama_cpp.child").pid == engine.pid


def test_a_second_serve_on_the_same_data_is_refused(make_node: Callable[..., Node]) -> None:
    node = make_node().start()
    assert node.process is not None
    second = subprocess.run(node.command(), capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert second.returncode == ExitCode.UNAVAILABLE
    assert str(node.process.pid) in second.stdout
    assert second.stdout.count("\n") == 1
    assert node.status("/livez") == 200


def test_a_busy_port_is_named_before_anything_starts(make_node: Callable[..., Node]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        node = make_node(port)
        done = subprocess.run(node.command(), capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == ExitCode.PORT_BUSY
    assert str(port) in done.stdout
    assert "gateway.http_port" in done.stdout
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def _find(node: Node, module: str) -> psutil.Process:
    (found,) = [process for process in node.children() if any(module in part for part in command_of(process))]
    return found
