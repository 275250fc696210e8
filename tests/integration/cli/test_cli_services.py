"""`helixflow keys` and `helixflow doctor` against real services, sockets and ports; `helixflow` as a real process."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from helixflow.auth.service import SERVICE_NAME, create_auth
from helixflow.core.keys import is_well_formed
from helixflow.rpc.servers import add_health_and_reflection, create_server, listen
from helixflow.rpc.sockets import prepare_run_dir, socket_path
from helixflow.settings.tree import Settings
from tests.harness.pki import Pki, allow

COMMAND = (sys.executable, "-m", "helixflow.cli.main")
TIMEOUT_S = 60


@asynccontextmanager
async def control_running(data_dir: Path) -> AsyncIterator[None]:
    settings = Settings(data_dir=data_dir)
    prepare_run_dir(settings.run_dir)
    services = await create_auth(settings, None)
    identity = Pki(data_dir).identity("control")
    server = create_server(identity, allow(SERVICE_NAME))
    try:
        services.register(server)
        await add_health_and_reflection(server, [SERVICE_NAME])
        await listen(server, socket_path(settings.run_dir, "control"), identity)
        await server.start()
        yield
    finally:
        await services.close()
        await server.stop(1)


async def helixflow(*words: str) -> tuple[int, str, str]:
    """The command in a process of its own: gRPC's event loops do not share one."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *words, stdin=asyncio.subprocess.DEVNULL, stdout=-1, stderr=-1
    )
    async with asyncio.timeout(TIMEOUT_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_keys_live_from_creation_to_revocation(data_dir: Path) -> None:
    async with control_running(data_dir):
        code, out, err = await helixflow("keys", "create", "ci", "--expires", "30d", "--quiet")
        assert (code, err) == (0, "")
        assert is_well_formed(out.removesuffix("\n"))
        code, out, _ = await helixflow("keys", "create", "laptop", "--json")
        created = json.loads(out)
        assert (code, created["name"], created["expires_at"]) == (0, "laptop", 0)
        assert is_well_formed(created["key"])
        code, out, _ = await helixflow("keys", "revoke", created["key_id"])
        assert (code, out) == (0, f"revoked laptop ({created['key_id']})\n")
        listed = json.loads((await helixflow("keys", "list", "--json"))[1])["keys"]
        assert {key["name"]: key["state"] for key in listed} == {
            "ci": "valid",
            "laptop": "revoked",
            "bootstrap": "valid",
        }
        assert created["key"] not in (await helixflow("keys", "list"))[1]
        assert await helixflow("keys", "revoke", "key_none") == (1, "", "helixflow: There is no key 'key_none'.\n")
        code, out, err = await helixflow("keys", "create", "")
        assert (code, out, err.count("\n")) == (1, "", 1)


async def test_doctor_sees_the_running_service(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIXFLOW_GATEWAY__HTTP_PORT", "0")
    async with control_running(data_dir):
        code, out, _ = await helixflow("doctor", "--json")
    report = json.loads(out)
    checks = {check["name"]: check for check in report["checks"]}
    assert (code, report["ok"]) == (0, True)
    assert checks["services"]["running"] is True
    assert checks["engine"]["status"] == "ok"
    assert {"python", "cpu", "gpu", "memory", "port", "data_dir", "model smollm2-135m-instruct"} <= checks.keys()


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
