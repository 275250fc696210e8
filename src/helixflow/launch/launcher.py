"""The launcher: one small process with one thread, parent of control, gateways, shipper and engines.

    python -m helixflow.launch.launcher --settings-fd N --lock-fd N [--role node|pool] [--listen-fd N]
        [--tls-listen-fd N] [--data-listen-fd N] [--on-ready JSON]

It keeps its children alive, hands the listening sockets to every generation of gateways and relays, answers the pool on
`data_dir/run/launcher.sock`, and ends everything in order: gateways drain, then shipper and control end, the relay
drains, and engines end. It loads neither asyncio nor gRPC: what it does not contain cannot bring down everything at
once. As a pool it has neither gateways nor shipper, and in place of control the pool alone.
"""

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, Literal

from helixflow.core.errors import ExitCode
from helixflow.launch.engine_table import EngineTable
from helixflow.launch.request_socket import RequestSocket
from helixflow.launch.service_process import ServiceProcess
from helixflow.process.loop import Loop, Timer
from helixflow.process.record import RecordLog
from helixflow.process.shim import command
from helixflow.process.spawn import Spawned, spawn

SHIPPER_GRACE_S: Final = 5.0
CONTROL_GRACE_S: Final = 5.0
ENGINE_GRACE_S: Final = 3.0
DRAIN_EXTRA_S: Final = 5.0
# The last resort, should a process survive SIGKILL (stuck in the kernel).
KILL_WAIT_S: Final = 5.0
SOCKET_NAME: Final = "launcher.sock"
# What the control process listens on: auth, pool, the admin API.
CONTROL_SOCKETS: Final = ("control.sock", "pool.sock", "admin.sock")
# Tell the command line where the gateway listens.
URL_NAME: Final = "gateway.url"
HTTPS_URL_NAME: Final = "gateway.https_url"
# Tells where the auth service listens for gRPC; the control process writes it.
AUTH_ADDRESS_NAME: Final = "auth.address"
# The same of the pool.
POOL_ADDRESS_NAME: Final = "pool.address"
# Tells how far the shipper is, see `metering.shipping.figures`.
SHIPPER_STATUS_NAME: Final = "shipper.json"
_CONTROL: Final = "helixflow.launch.control"
_POOL: Final = "helixflow.launch.pool"
_SHIPPER: Final = "helixflow.launch.shipper"
# Engines have no use for these, nor for what the settings name.
_SECRET_VARIABLES: Final = frozenset(
    {
        "HELIXFLOW_BOOTSTRAP_API_KEY",
        "HELIXFLOW_API_KEY",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "OPENAI_API_KEY",
    }
)
# As the gateway reads header values.
_VARIABLE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Phase(Enum):
    """What the launcher is doing; the order of shutdown."""

    RUNNING = 0
    DRAINING = 1
    STOPPING_SHIPPER = 2
    STOPPING_CONTROL = 3
    DRAINING_RELAY = 4
    STOPPING_ENGINES = 5
    DONE = 6


@dataclass(frozen=True, slots=True)
class LauncherOptions:
    """What the launcher needs to know. Read from the settings' JSON without pydantic, which would double its memory.

    `secret_variables` are the environment variables that engines must not inherit.
    """

    run_dir: Path
    drain_timeout_s: float
    gateways: int
    log_level: str
    log_format: Literal["auto", "text", "json"]
    settings_fd: int
    listen_fd: int | None = None
    tls_listen_fd: int | None = None
    # None: gateways of other nodes have no way to the engines here.
    data_listen_fd: int | None = None
    secret_variables: frozenset[str] = _SECRET_VARIABLES
    control_name: str = "control"
    control_module: str = _CONTROL
    gateway_module: str = "helixflow.launch.gateway"
    # None: nothing is metered, so there is nothing to ship.
    shipper_module: str | None = _SHIPPER
    relay_module: str = "helixflow.launch.relay"

    @classmethod
    def read(
        cls,
        settings_fd: int,
        listen_fd: int | None = None,
        tls_listen_fd: int | None = None,
        data_listen_fd: int | None = None,
        *,
        pool_alone: bool = False,
    ) -> "LauncherOptions":
        with os.fdopen(os.dup(settings_fd), "rb") as file:
            file.seek(0)
            tree = json.load(file)
        return cls(
            run_dir=Path(tree["data_dir"]) / "run",
            drain_timeout_s=float(tree["gateway"]["drain_timeout_s"]),
            gateways=0 if pool_alone else int(tree["gateway"]["workers"]),
            log_level=tree["log"]["level"],
            log_format=tree["log"]["format"],
            settings_fd=settings_fd,
            listen_fd=listen_fd,
            tls_listen_fd=tls_listen_fd,
            data_listen_fd=data_listen_fd,
            secret_variables=_SECRET_VARIABLES | find_secret_variables(tree),
            control_name="pool" if pool_alone else "control",
            control_module=_POOL if pool_alone else _CONTROL,
            shipper_module=_SHIPPER if tree["metering"]["enabled"] and not pool_alone else None,
        )


def find_secret_variables(tree: Mapping[str, Any]) -> set[str]:
    """The environment variables that hold secrets, as the settings name them: the master key, the passwords of
    database and Redis, keys and header values of deployments.
    """
    passwords = [tree[section].get("password_env") for section in ("database", "redis")]
    named = (tree["auth"].get("master_key_env"), *passwords)
    names = {variable for variable in named if variable}
    for model in tree["models"]:
        for deployment in model["deployments"]:
            if variable := deployment.get("api_key_env"):
                names.add(variable)
            for value in deployment.get("headers", {}).values():
                names.update(_VARIABLE.findall(value))
    return names


class Launcher:
    """Runs until a signal, or until restarting makes no sense; `run` returns the exit code."""

    def __init__(
        self, options: LauncherOptions, log: RecordLog, environ: Mapping[str, str], on_ready: Sequence[str] = ()
    ) -> None:
        self._options = options
        self._log = log
        self._on_ready = on_ready
        self._loop = Loop()
        self._phase = Phase.RUNNING
        self._exit_code = int(ExitCode.OK)
        self._deadline: Timer | None = None
        self._welcome: Spawned | None = None
        self._life_read, self._life_write = os.pipe()
        engine_environ = {name: value for name, value in environ.items() if name not in options.secret_variables}
        self._engines = EngineTable(self._loop, log, engine_environ, self._tell)
        self._control = self._service(options.control_name, options.control_module)
        api = {"--listen-fd": options.listen_fd, "--tls-listen-fd": options.tls_listen_fd}
        self._gateways = [
            self._service(f"gateway-{index}", options.gateway_module, api) for index in range(options.gateways)
        ]
        data = {"--listen-fd": options.data_listen_fd}
        self._relays = (
            [self._service("relay", options.relay_module, data)] if options.data_listen_fd is not None else []
        )
        # It ships what the gateways leave, also when they ended by themselves.
        self._shippers = [self._service("shipper", options.shipper_module)] if options.shipper_module else []
        self._socket = RequestSocket(self._loop, options.run_dir / SOCKET_NAME, self._respond)

    def run(self) -> int:
        stops = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            stops.append(signal.SIGHUP)
        self._loop.on_signals(stops, lambda _number: self._stop_or_hurry())
        self._loop.on_signals([signal.SIGCHLD], lambda _number: self._reap())
        for service in self._services:
            service.start()
        self._loop.run()
        self._socket.close()
        files = (URL_NAME, HTTPS_URL_NAME, AUTH_ADDRESS_NAME, POOL_ADDRESS_NAME, SHIPPER_STATUS_NAME)
        for name in (*CONTROL_SOCKETS, *files):
            (self._options.run_dir / name).unlink(missing_ok=True)
        self._loop.close()
        return self._exit_code

    @property
    def _services(self) -> list[ServiceProcess]:
        return [self._control, *self._gateways, *self._shippers, *self._relays]

    def _service(self, name: str, module: str, listeners: Mapping[str, int | None] | None = None) -> ServiceProcess:
        def start_child(ready_fd: int) -> Spawned:
            fds = {"--settings-fd": self._options.settings_fd, "--life-fd": self._life_read, "--ready-fd": ready_fd}
            fds |= {option: fd for option, fd in (listeners or {}).items() if fd is not None}
            argv = [sys.executable, "-P", "-m", module, "--name", name]
            for option, fd in fds.items():
                argv += [option, str(fd)]
            return spawn(argv, pass_fds=fds.values())

        return ServiceProcess(name, self._loop, self._log, start_child, on_ready=self._greet, on_fatal=self._give_up)

    def _greet(self) -> None:
        """Starts the welcome command once everything serves."""
        if self._on_ready and self._phase is Phase.RUNNING and all(service.is_ready for service in self._services):
            argv, self._on_ready = self._on_ready, ()
            try:
                self._welcome = spawn(command(argv, parent=os.getpid()))
            except OSError as exc:
                self._log.warning("welcome.failed", reason=str(exc))

    def _respond(self, request: dict[str, Any]) -> dict[str, Any]:
        match request:
            case {"op": "start", "name": str(name), "argv": [str(), *_] as argv}:
                if self._phase not in (Phase.RUNNING, Phase.DRAINING):
                    raise ValueError("shutting down")
                env, stdin = request.get("env", {}), request.get("stdin", "")
                if not _are_strings(argv, env) or not isinstance(stdin, str):
                    raise ValueError("argv and stdin are strings, env is an object of strings")
                return {"pid": self._engines.start(name, argv, env, stdin.encode(), request.get("meta"))}
            case {"op": "stop", "name": str(name), "grace_s": int(grace_s) | float(grace_s)}:
                return {"found": self._engines.stop(name, float(grace_s))}
            case {"op": "list"}:
                return {"pid": os.getpid(), "engines": self._engines.describe()}
        raise ValueError('a request is {"op": "start", name, argv}, {"op": "stop", name, grace_s} or {"op": "list"}')

    def _tell(self, event: dict[str, Any]) -> None:
        self._socket.broadcast(event)

    def _reap(self) -> None:
        for service in self._services:
            service.reap()
        self._engines.reap()
        if self._welcome is not None and (status := self._welcome.poll()) is not None:
            level = "debug" if status == 0 or self._phase is not Phase.RUNNING else "warning"
            self._log.write(level, "welcome.exited", status=status)
            self._welcome = None
        self._advance()

    def _give_up(self, exit_code: int, reason: str) -> None:
        if self._phase is Phase.RUNNING:
            self._exit_code = int(exit_code)
            self._log.error("launcher.gave_up", reason=reason)
            # Not from within the caller: it may be half-way through reaping.
            self._loop.call_later(0, self._stop)

    def _stop_or_hurry(self) -> None:
        if self._phase is Phase.RUNNING:
            self._stop()
        else:
            self._log.warning("launcher.hurried", phase=self._phase.name.lower())
            self._kill_all()

    def _stop(self) -> None:
        if self._phase is not Phase.RUNNING:
            return
        self._log.info("launcher.stopping", drain_timeout_s=self._options.drain_timeout_s)
        if self._welcome is not None:
            self._welcome.terminate()
        self._enter(Phase.DRAINING)
        for gateway in self._gateways:
            gateway.stop()
        self._advance()

    def _advance(self) -> None:
        """Moves on when the processes of this phase have ended."""
        if self._phase is Phase.DRAINING and not any(gateway.is_running for gateway in self._gateways):
            # Gateways have ended: it ships their journals to the end while control still takes them.
            self._enter(Phase.STOPPING_SHIPPER)
            for shipper in self._shippers:
                shipper.stop()
        if self._phase is Phase.STOPPING_SHIPPER and not any(shipper.is_running for shipper in self._shippers):
            self._enter(Phase.STOPPING_CONTROL)
            self._control.stop()
        if self._phase is Phase.STOPPING_CONTROL and not self._control.is_running:
            # The pool has told gateways elsewhere not to send anything more; what runs for them goes on.
            self._enter(Phase.DRAINING_RELAY)
            for relay in self._relays:
                relay.stop()
        if self._phase is Phase.DRAINING_RELAY and not any(relay.is_running for relay in self._relays):
            self._enter(Phase.STOPPING_ENGINES)
            self._engines.stop_all(ENGINE_GRACE_S)
        if self._phase is Phase.STOPPING_ENGINES and len(self._engines) == 0 and self._welcome is None:
            self._enter(Phase.DONE)
            self._log.info("launcher.stopped")
            self._loop.stop()

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        if self._deadline is not None:
            self._deadline.cancel()
        limit_s = {
            Phase.DRAINING: self._options.drain_timeout_s + DRAIN_EXTRA_S,
            Phase.STOPPING_SHIPPER: SHIPPER_GRACE_S,
            Phase.STOPPING_CONTROL: CONTROL_GRACE_S,
            Phase.DRAINING_RELAY: self._options.drain_timeout_s + DRAIN_EXTRA_S,
            Phase.STOPPING_ENGINES: ENGINE_GRACE_S + KILL_WAIT_S,
        }.get(phase)
        self._deadline = self._loop.call_later(limit_s, self._overdue) if limit_s is not None else None

    def _overdue(self) -> None:
        """A phase took too long: SIGKILL; and when even that does not help, leave."""
        self._log.warning("launcher.overdue", phase=self._phase.name.lower())
        if self._phase is Phase.DRAINING:
            for gateway in self._gateways:
                gateway.kill()
        elif self._phase is Phase.STOPPING_SHIPPER:
            for shipper in self._shippers:
                shipper.kill()
        elif self._phase is Phase.STOPPING_CONTROL:
            self._control.kill()
        elif self._phase is Phase.DRAINING_RELAY:
            for relay in self._relays:
                relay.kill()
        else:
            self._kill_all()
        self._deadline = self._loop.call_later(KILL_WAIT_S, self._loop.stop)

    def _kill_all(self) -> None:
        for service in self._services:
            service.kill()
        self._engines.stop_all(0)
        if self._welcome is not None:
            self._welcome.kill()


def _are_strings(argv: list[object], env: object) -> bool:
    if not isinstance(env, dict) or not all(isinstance(part, str) for part in argv):
        return False
    return all(isinstance(name, str) and isinstance(value, str) for name, value in env.items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="helixflow.launch.launcher", description=__doc__)
    parser.add_argument("--settings-fd", type=int, required=True)
    parser.add_argument("--role", choices=("node", "pool"), default="node")
    for option in ("--listen-fd", "--tls-listen-fd", "--data-listen-fd"):
        parser.add_argument(option, type=int, default=None)
    parser.add_argument("--lock-fd", type=int, default=None, help="keeps the data directory's lock")
    parser.add_argument("--on-ready", type=json.loads, default=[], metavar="JSON_ARGV")
    given = parser.parse_args(argv)
    listeners = (given.listen_fd, given.tls_listen_fd, given.data_listen_fd)
    for fd in (given.settings_fd, given.lock_fd, *listeners):
        if fd is not None:
            os.set_inheritable(fd, False)
    options = LauncherOptions.read(given.settings_fd, *listeners, pool_alone=given.role == "pool")
    log = RecordLog(sys.stderr, level=options.log_level, format=options.log_format, service="launcher")
    # Engines start from our own environment: the launcher is where it enters.
    return Launcher(options, log, os.environ, given.on_ready).run()


if __name__ == "__main__":
    sys.exit(main())
