"""A PostgreSQL server of the test run's own, on a random port of loopback, with SCRAM passwords and without fsync.

Use the fixtures of tests/conftest.py:

- `database_settings`: `Settings` of a fresh database that is not migrated yet (unless the test takes `database` too). A
  test that takes it runs twice, on SQLite and on PostgreSQL. `data_dir` is `tmp_path / "data"`.
- `database`: the same, upgraded and opened (`helixflow.storage.engine.Database`), closed afterwards. A second one on
  the same data, as of another control process: `open_database(database_settings)`.
- `postgres_server`: this server, for the whole run. `with postgres_server.database() as url:` is one more database, and
  `postgres_server.settings(url, folder)` are the `DatabaseSettings` for it. `kill()` ends it as kill -9 does, `start()`
  brings it back, `execute(sql, database)` runs statements as its superuser.

Tests of one kind of database alone use `postgres_server` directly, or `Settings(data_dir=tmp_path)`, which is SQLite.
"""

import asyncio
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self

import asyncpg
import psutil

from helixflow.settings.tree import DatabaseSettings
from tests.harness.ports import free_port

ROLE = "helixflow"
_SUPERUSER = "superuser"
_START_TIMEOUT_S = 120.0
_PREFIX = "hf-pg-"
_OPTIONS = {
    "listen_addresses": "127.0.0.1",
    # Commits survive kill -9, not a power cut.
    "fsync": "off",
    "full_page_writes": "off",
    # It would take locks of its own at some time or other.
    "autovacuum": "off",
    "max_connections": "60",
    "shared_buffers": "32MB",
    "log_min_messages": "warning",
}
_ADVICE = (
    "no PostgreSQL server found: install it (Debian: apt-get install postgresql) or put initdb and postgres on PATH"
)


class PostgresServer:
    """Made by `create`, which starts it. `role_password` is that of `ROLE`, the owner of all databases made here."""

    def __init__(self, folder: Path, binaries: Path) -> None:
        self._folder = folder
        self._binaries = binaries
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = ThreadPoolExecutor(1, "postgres")
        self._password = secrets.token_hex(16)
        self.role_password = secrets.token_hex(16)
        self.port = free_port()

    @classmethod
    def create(cls) -> Self:
        # Not below pytest's own folders: they are closed to the user that the server runs as.
        _remove_leftovers()
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        server = cls(folder, find_binaries())
        try:
            server._initialise()
            server.start()
            server.execute(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{server.role_password}'")
        except BaseException:
            server.remove()
            raise
        return server

    def url(self, database: str) -> str:
        return f"postgresql://{ROLE}@127.0.0.1:{self.port}/{database}"

    @property
    def socket_folder(self) -> Path:
        return self._folder

    def settings(self, url: str, folder: Path, **more: Any) -> DatabaseSettings:
        """Settings for `url`, with the password in a file below `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "postgres-password"
        file.write_text(self.role_password)
        return DatabaseSettings(url=url, password_file=file, **more)

    @contextmanager
    def database(self, *, template: str = "template1") -> Iterator[str]:
        """A fresh database of `ROLE`'s and its URL; dropped afterwards, together with whoever is still connected."""
        self.start()
        name = f"t_{secrets.token_hex(6)}"
        self.execute(f"CREATE DATABASE {name} OWNER {ROLE} TEMPLATE {template}")
        try:
            yield self.url(name)
        finally:
            self.start()
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def start(self) -> None:
        """Starts the server unless it runs, and waits until it answers."""
        if self._process is not None and self._process.poll() is None:
            return
        options = {**_OPTIONS, "port": str(self.port), "unix_socket_directories": str(self._folder)}
        command = [str(self._binaries / "postgres"), "-D", str(self._folder / "data")]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        with (self._folder / "log").open("ab") as log:
            # The server goes when we go, whatever ends us: or rather when this thread does, says prctl(2).
            words = [*_as_owner("QUIT"), *command]
            self._process = self._thread.submit(_spawn, words, log).result()
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                self.execute("SELECT 1")
            except (OSError, asyncpg.PostgresError) as exc:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"PostgreSQL does not start: {self._log()}") from exc
                time.sleep(0.02)
            else:
                return

    def stop(self) -> None:
        """An orderly end (fast shutdown): connections are told."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Ends the postmaster and everything below it with SIGKILL."""
        self._end(signal.SIGKILL)

    @contextmanager
    def offering_tls(self, certificate: bytes, key: bytes) -> Iterator[None]:
        """TLS with a certificate and its key (PEM), as long as the block runs."""
        for name, content in (("server.crt", certificate), ("server.key", key)):
            file = self._folder / "data" / name
            file.write_bytes(content)
            self._give_away(file)
            file.chmod(0o600)
        self._set_tls("on")
        try:
            yield
        finally:
            self._set_tls("off")

    def execute(self, sql: str, database: str = "postgres") -> list[Any]:
        """The rows of `sql`, run by the superuser. Also from within a running event loop, which it blocks."""

        async def run() -> list[Any]:
            connection = await asyncpg.connect(
                host=str(self._folder), port=self.port, user=_SUPERUSER, password=self._password, database=database
            )
            try:
                return list(await connection.fetch(sql))
            finally:
                await connection.close()

        return self._thread.submit(lambda: asyncio.run(run())).result()

    def remove(self) -> None:
        """Ends the server and deletes all it wrote."""
        self._end(signal.SIGQUIT)
        self._thread.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _initialise(self) -> None:
        self._give_away(self._folder)
        secret = self._folder / "superuser-password"
        secret.write_text(self._password)
        self._give_away(secret)
        options = ["--encoding=UTF8", "--locale=C.UTF-8", "--auth=scram-sha-256", "--no-sync", "--no-instructions"]
        command = [
            str(self._binaries / "initdb"),
            "-D",
            str(self._folder / "data"),
            "-U",
            _SUPERUSER,
            f"--pwfile={secret}",
        ]
        done = subprocess.run([*_as_owner(), *command, *options], capture_output=True, text=True, cwd="/", check=False)
        assert done.returncode == 0, done.stderr
        secret.unlink()

    def _give_away(self, path: Path) -> None:
        owner = _owner()
        if owner is not None:
            os.chown(path, owner.pw_uid, owner.pw_gid)

    def _set_tls(self, state: str) -> None:
        self.execute(f"ALTER SYSTEM SET ssl = {state}")
        self.execute("SELECT pg_reload_conf()")
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self.execute("SHOW ssl")[0][0] != state:
            assert time.monotonic() < deadline, self._log()
            time.sleep(0.01)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        # Backends notice that their postmaster is gone, but a start must not meet one that has not noticed yet.
        below = psutil.Process(process.pid).children() if number is signal.SIGKILL else []
        for pid in (process.pid, *(child.pid for child in below)):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        process.wait(_START_TIMEOUT_S)

    def _log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")[-2000:]


def find_binaries() -> Path:
    """The folder of `initdb` and `postgres`; installs Debian's package where that can be done. Never skips."""
    found = _look_for_binaries()
    if found is None and os.geteuid() == 0 and shutil.which("apt-get") is not None:
        _install()
        found = _look_for_binaries()
    if found is None:
        raise AssertionError(_ADVICE)
    return found


def _look_for_binaries() -> Path | None:
    installed = Path("/usr/lib/postgresql").glob("*/bin")
    newest_first = sorted(installed, key=lambda folder: int(folder.parent.name.split(".")[0]), reverse=True)
    on_path = shutil.which("initdb")
    folders = [*newest_first, *([Path(on_path).resolve().parent] if on_path is not None else [])]
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


def _install() -> None:
    """Debian's package without its service: `policy-rc.d` is how Debian asks whether to start one."""
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "--no-install-recommends", "postgresql"]
    try:
        # The list of packages may be old, or not there at all.
        for command in (install, ["apt-get", "update"], install):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
            if command is install and done.returncode == 0:
                break
    finally:
        if ours:
            policy.unlink()
    if done.returncode != 0:
        raise AssertionError(f"{_ADVICE}\n{done.stderr}")


def _owner() -> pwd.struct_passwd | None:
    """Whom the server runs as when we are root, which it refuses."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    return names.get("postgres") or names["nobody"]


def _as_owner(death_signal: str | None = None) -> list[str]:
    owner = _owner()
    words = [f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"] if owner is not None else []
    if death_signal is not None:
        words += ["--pdeathsig", death_signal]
    if owner is None and shutil.which("setpriv") is None:
        return []
    return ["setpriv", *words, "--"] if words else []


def _remove_leftovers() -> None:
    """What runs left behind that were killed; their servers went with them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _spawn(words: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(words, stdout=log, stderr=log, cwd="/")
