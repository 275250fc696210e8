"""A second node of a fleet on the same machine: `helixflow pool`, with certificates from the first node's authority."""

import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from helixflow.core.clock import FakeClock
from helixflow.pki.files import PkiFolder
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.issuing import Issuance
from helixflow.pki.names import Names
from helixflow.pool.manifest import StoredModel
from helixflow.settings.tree import Settings
from tests.harness.node import (
    HELIXFLOW,
    READY_S,
    WAIT_S,
    Node,
    command_of,
    environment,
    fill_store,
    is_alive,
    until,
)
from tests.harness.ports import free_port

POOL_NAME = "far"


def give_certificate(data_dir: Path, authority: Settings, service: str = "pool", *, age_h: float = 0) -> None:
    """What an operator did `age_h` ago: `helixflow pki issue`, and two files copied."""
    folder = PkiFolder(data_dir / "pki")
    folder.prepare()
    shutil.copy(PkiFolder(authority.pki_dir).ca_certificate, folder.ca_certificate)
    path = folder.service_file(service)
    path.touch(mode=0o600)
    then = FakeClock(time.time() - age_h * 3600)
    path.write_bytes(Issuance(authority, clock=then).issue_elsewhere(service, Names()))


class PoolProcess:
    """A running `helixflow pool` with its data directory; standard error goes to `err`."""

    def __init__(self, data_dir: Path, control: str, **settings: str) -> None:
        self.data_dir = data_dir
        self.err = data_dir.with_name(f"{data_dir.name}.err")
        self.environment = environment(
            data_dir, HELIXFLOW_POOL__NAME=POOL_NAME, HELIXFLOW_POOL__CONTROL=control, **settings
        )
        self._seen: dict[int, psutil.Process] = {}
        with self.err.open("ab") as err:
            self.process = subprocess.Popen(
                [HELIXFLOW, "pool"], env=self.environment, stdout=subprocess.DEVNULL, stderr=err, start_new_session=True
            )

    def wait_serving(self) -> "PoolProcess":
        address = self.data_dir / "run" / "pool.address"
        until(lambda: self.process.poll() is not None or address.exists(), READY_S)
        assert self.process.poll() is None, self.err.read_text()
        return self

    @property
    def identity(self) -> ServiceIdentity:
        return ServiceIdentity.open(Settings(data_dir=self.data_dir), "pool")

    def records(self, event: str) -> list[dict[str, Any]]:
        """Log records with this event, oldest first."""
        lines = self.err.read_text().splitlines(keepends=True)
        decoded = (msgspec.json.decode(line) for line in lines if line.startswith("{") and line.endswith("\n"))
        return [record for record in decoded if record.get("event") == event]

    def tree(self) -> list[psutil.Process]:
        """The living processes that were ever seen, the launcher first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            for process in (launcher, *launcher.children(recursive=True)):
                self._seen.setdefault(process.pid, process)
        return [process for process in self._seen.values() if is_alive(process)]

    def find(self, module: str) -> psutil.Process:
        """The one process that runs `module`."""
        (found,) = (process for process in self.tree() if module in command_of(process))
        return found

    def close(self) -> None:
        """Ends it and whatever it left. Fails when something was left."""
        self.tree()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(WAIT_S)
            until(lambda: not self.tree())
        finally:
            for process in self.tree():
                process.kill()


@contextlib.contextmanager
def run_fleet(folder: Path, *models: StoredModel, config: Path) -> Iterator[tuple[Node, PoolProcess]]:
    """`helixflow serve` without engines and `helixflow pool` with all of them, until the end of the block. The pool has
    what it serves from the first node's `config`; its certificate is of yesterday, and due.
    """
    control = free_port()
    node = Node(folder / "near", HELIXFLOW_CONFIG=str(config), HELIXFLOW_AUTH__PORT=str(control))
    pool: PoolProcess | None = None
    try:
        node.find_port()
        address = node.data_dir / "run" / "auth.address"
        until(lambda: node.process.poll() is not None or address.exists(), READY_S)
        far = folder / "far"
        fill_store(far, *models)
        give_certificate(far, Settings(data_dir=node.data_dir), age_h=20)
        pool = PoolProcess(far, f"127.0.0.1:{control}").wait_serving()
        node.wait_ready()
        yield node, pool
    finally:
        node.close()
        if pool is not None:
            pool.close()
