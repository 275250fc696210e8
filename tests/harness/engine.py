"""A real llama.cpp engine as a process of its own, as the pool starts it."""

import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from helixflow.core.capacity import Replica
from helixflow.engines.llama_cpp.command import build
from helixflow.settings.deployments import LlamaCppDeployment
from tests.harness.ports import free_port

READY_S = 120.0


@dataclass(frozen=True, slots=True)
class RunningEngine:
    replica: Replica
    process: "subprocess.Popen[bytes]"

    def get(self, path: str) -> Any:
        """The JSON that the engine answers."""
        return msgspec.json.decode(self.read(path))

    def read(self, path: str) -> bytes:
        """What the engine answers."""
        replica = self.replica
        head = {"authorization": f"Bearer {replica.api_key}"}
        question = urllib.request.Request(f"http://{replica.host}:{replica.port}{path}", headers=head)
        with urllib.request.urlopen(question, timeout=READY_S) as answer:
            return bytes(answer.read())

    def metric(self, name: str) -> float:
        """One figure of the engine's own `/metrics`."""
        lines = (line.partition(" ") for line in self.read("/metrics").decode().splitlines())
        return next(float(value) for found, _, value in lines if found == name)

    @property
    def busy_slots(self) -> int:
        return sum(slot["is_processing"] for slot in self.get("/slots"))


@contextmanager
def run_engine(deployment: LlamaCppDeployment, model_path: Path) -> Iterator[RunningEngine]:
    """Runs until the end of the block. Raises `RuntimeError` when it does not get ready."""
    port = free_port()
    command = build(deployment, model_path=model_path, port=port, key="engine-key", public_name="tiny")
    process = subprocess.Popen(command.argv, stdin=subprocess.PIPE, env={**os.environ, **command.env})
    assert process.stdin is not None
    process.stdin.write(command.stdin.encode())
    process.stdin.close()
    try:
        _wait_ready(port, process)
        replica = Replica("r1", "127.0.0.1", port, "engine-key", deployment.parallel, deployment.context)
        yield RunningEngine(replica, process)
    finally:
        process.kill()
        process.wait()


def _wait_ready(port: int, process: "subprocess.Popen[bytes]") -> None:
    give_up = time.monotonic() + READY_S
    while time.monotonic() < give_up and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=READY_S).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.05)
    raise RuntimeError("the engine did not get ready")
