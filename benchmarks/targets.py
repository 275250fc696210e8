"""The servers that are measured: HelixFlow itself, the bare app, nginx; and the mock upstream behind them."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.processes import (
    GATEWAY_CORE,
    LOAD_CORE,
    START_TIMEOUT_S,
    find_child,
    pin_tree,
    running,
    serving,
)
from helixflow.core.keys import generate_key

# The command of the environment that runs the benchmarks.
SERVE = (str(Path(sys.executable).parent / "helixflow"), "serve")
GATEWAY_MARK = "helixflow.launch.gateway"
MODELS = ("bench", "bench-paced", "bench-idle")


@dataclass(frozen=True, slots=True)
class Target:
    """A server under test. `root_pid` is what was started, `pid` the process whose cost counts."""

    name: str
    pid: int
    root_pid: int
    port: int
    api_key: str
    prefix: str
    data_dir: Path | None = None

    def model(self, kind: str = "") -> str:
        """The name under which the mock's model of this kind is asked for: HelixFlow renames, the others do not."""
        return f"{self.prefix}-{kind}" if kind else self.prefix

    def chat_body(self, kind: str = "", **fields: Any) -> bytes:
        return chat_body(self.model(kind), **fields)


def chat_body(model: str, content: str = "What is the capital of France?", **fields: Any) -> bytes:
    messages = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": content}]
    return json.dumps({"model": model, "messages": messages, **fields}, separators=(",", ":")).encode()


@contextlib.contextmanager
def mock() -> Iterator[Target]:
    with serving("benchmarks.mock_upstream", "--core", str(LOAD_CORE)) as (pid, port):
        yield Target("mock", pid, pid, port, "none", "mock")


@contextlib.contextmanager
def bare(upstream: Target) -> Iterator[Target]:
    address = f"http://127.0.0.1:{upstream.port}"
    with serving("benchmarks.bare_app", "--core", str(GATEWAY_CORE), "--upstream", address) as (pid, port):
        yield Target("bare", pid, pid, port, "none", "mock")


@contextlib.contextmanager
def gateway(upstream: Target, *, metered: bool = False, name: str = "helixflow") -> Iterator[Target]:
    """`helixflow serve` with one deployment for each of the mock's models; without metering that is the bare path."""
    deployments = "".join(
        f'[[models]]\nname = "{name}"\n[[models.deployments]]\nengine = "openai"\n'
        f'base_url = "http://127.0.0.1:{upstream.port}/v1"\nmodel = "{name.replace("bench", "mock")}"\n'
        "max_connections = 8192\n"
        for name in MODELS
    )
    with serve(f"[metering]\nenabled = {str(metered).lower()}\n{deployments}") as target:
        yield replace(target, name=name)


@contextlib.contextmanager
def serve(models: str, *, data_dir: Path | None = None, pinned: bool = True) -> Iterator[Target]:
    """`helixflow serve` with these models; ready when it lists them. `pinned`: the gateway alone on its core."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hf-")))
        home = data_dir if data_dir is not None else folder / "data"
        config, log, port, key = folder / "helixflow.toml", folder / "serve.log", free_port(), generate_key()
        config.write_text(
            f'data_dir = "{home}"\n[gateway]\nhttp_port = {port}\nhttps_port = 0\n[auth]\nport = 0\n'
            f"[pool]\nport = 0\n{models}"
        )
        process = stack.enter_context(running(SERVE, environment=serve_environment(config, key), log=log, cwd=folder))
        try:
            pid = find_child(process.pid, GATEWAY_MARK)
            wait_until_listed(port, key)
        except (RuntimeError, TimeoutError) as exc:
            raise RuntimeError(f"helixflow serve did not come up: {log.read_text()[-3000:]}") from exc
        if pinned:
            for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                pin_tree(child.pid, {LOAD_CORE})
            pin_tree(pid, {GATEWAY_CORE})
        yield Target("helixflow", pid, process.pid, port, key, "bench", home)


@contextlib.contextmanager
def nginx(upstream: Target) -> Iterator[Target | None]:
    """nginx `proxy_pass` with one worker and keep-alive to the upstream; None when it is not installed."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="hf-nginx-") as folder:
        port = free_port()
        config = Path(folder) / "nginx.conf"
        config.write_text(_NGINX.format(folder=folder, port=port, upstream=upstream.port))
        with running([program, "-p", folder, "-c", str(config)], log=Path(folder) / "out.log") as process:
            wait_for_port(port)
            worker = psutil.Process(process.pid).children()[0].pid
            pin_tree(worker, {GATEWAY_CORE})
            yield Target("nginx", worker, process.pid, port, "none", "mock")


_NGINX = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream mock {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    keepalive_requests 1000000;
    location / {{
      proxy_pass http://mock;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


def serve_environment(config: Path, key: str) -> dict[str, str]:
    """The environment for `helixflow serve`: none of the caller's own HelixFlow settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HELIXFLOW_")}
    return {**kept, "HELIXFLOW_CONFIG": str(config), "HELIXFLOW_BOOTSTRAP_API_KEY": key}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_for_port(port: int, timeout_s: float = START_TIMEOUT_S) -> None:
    until = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise TimeoutError(f"nothing listens on port {port}") from None
            time.sleep(0.01)


def wait_until_listed(port: int, key: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Until `GET /v1/models` answers with 200."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass  # not listening yet
        finally:
            connection.close()
        time.sleep(0.02)
    raise TimeoutError(f"port {port} gave no models")
