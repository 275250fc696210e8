"""`helixflow doctor` against real ports; `helixflow` as a real process."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMAND = (sys.executable, "-m", "helixflow.cli.main")
TIMEOUT_S = 180


def test_doctor_names_a_busy_port(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        monkeypatch.setenv("HELIXFLOW_GATEWAY__HTTP_PORT", str(port))
        outcome = run("doctor", "--json")
    check = next(check for check in json.loads(outcome.out)["checks"] if check["name"] == "port")
    assert outcome.code == 1
    assert check["status"] == "problem"
    assert f"port {port}" in check["message"]
    assert "gateway.http_port" in check["advice"]
    if sys.platform == "linux":
        assert f"process {os.getpid()}" in check["message"]


def test_doctor_finds_a_damaged_model(run: Callable[..., Any], data_dir: Path, tmp_path: Path, chat_model: Any) -> None:
    source = tmp_path / "m.gguf"
    source.write_bytes(chat_model.path.read_bytes())
    config = tmp_path / "h.toml"
    config.write_text(
        '[gateway]\nhttp_port = 0\n[[models]]\nname = "m"\n[[models.deployments]]\n'
        f'engine = "llama_cpp"\nsource = "file:{source}"\n'
    )
    pulled = run("--config", str(config), "models", "pull", "m")
    assert pulled.code == 0, pulled.err
    assert "verifying" in pulled.err
    assert run("--config", str(config), "doctor").code == 0
    before = source.stat()
    with source.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"damaged")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    outcome = run("--config", str(config), "doctor")
    assert outcome.code == 1
    assert "problem  model m:" in outcome.out
    assert "helixflow models pull m" in outcome.out
    assert run("--config", str(config), "models", "rm", "m").code == 2
    assert run("--config", str(config), "models", "rm", "m", "--yes").code == 0
    assert source.exists()


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("models list | head -c 1 > /dev/null", 1),
        ("--help | head -c 1 > /dev/null", 1),
        ("version >&-", 0),
        ("chat <&-", 2),
        ("head -c 999 /dev/urandom | HELIXFLOW chat -", 2),
        ("--config /proc/self/mem config check", 3),
        ("--data-dir /dev/null keys list", 6),
        ("--data-dir /dev/null/x doctor", 1),
        ("config show > /dev/full", 7),
    ],
)
def test_odd_surroundings_are_no_traceback(data_dir: Path, command: str, code: int) -> None:
    words = command if "HELIXFLOW" in command else f"HELIXFLOW {command}"
    script = words.replace("HELIXFLOW", f"'{COMMAND[0]}' -m helixflow.cli.main")
    if sys.platform != "linux" and ("/dev/full" in command or "/proc" in command):
        pytest.skip("Linux has this file, others do not")
    done = subprocess.run(["bash", "-c", f"{script}; exit ${{PIPESTATUS[-1]}}"], capture_output=True, timeout=TIMEOUT_S)
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    if "| head" not in command:
        assert done.returncode == code


def test_version_is_quick_and_light() -> None:
    program = (
        "import sys; from helixflow.cli.main import main; main(['version']);"
        "print([name for name in ('grpc', 'pydantic', 'sqlalchemy', 'asyncio', 'rich') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=TIMEOUT_S
    )
    assert done.stdout.splitlines()[-1] == "[]"
