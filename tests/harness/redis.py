"""A Redis server of the test run's own, on a random port of loopback, with a password, in memory only.

Use the fixture `redis_server` of tests/conftest.py, one server for the whole run: `settings(...)` are `RedisSettings`
for it. `kill()` ends it as kill -9 does, `start()` brings it back, empty; `pause()` and `resume()` stop it and let it
go on; `client()` is a client of the library `redis`, for administration. `flush()` empties it.
"""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Self

import redis

from helixflow.settings.tree import RedisSettings
from tests.harness.ports import free_port

_NAMES = ("redis-server", "valkey-server")
_START_TIMEOUT_S = 60.0
_ADVICE = (
    "no Redis server found: put redis-server or valkey-server on PATH, as by `apt-get install redis-server` of an "
    "administrator (as root the tests install it themselves)"
)


class RedisServer:
    """Made by `create`, which starts it."""

    def __init__(self, folder: Path, binary: Path) -> None:
        self._folder = folder
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = ThreadPoolExecutor(1, "redis")
        self.password = secrets.token_hex(16)
        self.port = free_port()

    @classmethod
    def create(cls) -> Self:
        server = cls(Path(tempfile.mkdtemp(prefix="hf-redis-")), find_binary())
        try:
            server.start()
        except BaseException:
            server.remove()
            raise
        return server

    @property
    def socket_path(self) -> Path:
        return self._folder / "redis.sock"

    @property
    def process_id(self) -> int:
        assert self._process is not None
        return self._process.pid

    def settings(self, **more: Any) -> RedisSettings:
        """`RedisSettings` for it, with the password in a file."""
        file = self._folder / "password"
        if not file.exists():
            file.write_text(self.password)
        return RedisSettings(**{"url": f"redis://127.0.0.1:{self.port}", "password_file": file, **more})

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, password=self.password)

    def flush(self) -> None:
        with self.client() as client:
            client.flushall()

    def start(self, *options: str) -> None:
        """Starts the server unless it runs, and waits until it answers."""
        if self._process is not None and self._process.poll() is None:
            return
        command = [
            str(self._binary),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)),
            *("--unixsocket", str(self.socket_path), "--requirepass", self.password),
            *("--save", "", "--appendonly", "no", "--loglevel", "warning", *options),
        ]
        with (self._folder / "log").open("ab") as log:
            # The server goes when we go, whatever ends us: or rather when this thread does, says prctl(2).
            self._process = self._thread.submit(_spawn, command, log).result()
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                with self.client() as client:
                    client.ping()
            except redis.RedisError as exc:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"Redis does not start: {self._log()}") from exc
                time.sleep(0.01)
            else:
                return

    def start_with_tls(self, certificate: Path) -> int:
        """The same, and the port where it speaks TLS besides; `certificate` has the key, too (PEM)."""
        port = free_port()
        tls = ("--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(certificate))
        self.start(*tls, "--tls-auth-clients", "no", "--tls-ca-cert-file", str(certificate))
        return port

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        os.kill(self.process_id, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.process_id, signal.SIGCONT)

    def remove(self) -> None:
        """Ends the server and deletes all it wrote."""
        self._end(signal.SIGKILL)
        self._thread.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(number)
        process.wait(_START_TIMEOUT_S)

    def _log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")[-2000:]


def find_binary() -> Path:
    """The server's program; installs Debian's package where that can be done, as root. Never skips."""
    found = _look_for_binary()
    if found is not None:
        return found
    if shutil.which("apt-get") is None or os.geteuid():
        raise AssertionError(_ADVICE)
    problem = _install()
    found = _look_for_binary()
    if found is None:
        raise AssertionError(f"{_ADVICE}\n{problem}")
    return found


def _look_for_binary() -> Path | None:
    for name in _NAMES:
        on_path = shutil.which(name)
        if on_path is not None:
            return Path(on_path)
    return None


def _install() -> str:
    """Debian's package without its service: `policy-rc.d` is how Debian asks whether to start one."""
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "--no-install-recommends", "redis-server"]
    try:
        # The list of packages may be old, or not there at all.
        for command in (install, ["apt-get", "update"], install):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
            if command is install and done.returncode == 0:
                break
    finally:
        if ours:
            policy.unlink()
    return done.stderr


def _spawn(command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    words = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") is not None else []
    return subprocess.Popen([*words, *command], stdout=log, stderr=log, cwd="/")
