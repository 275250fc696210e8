import os
import signal
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from helixflow.core.errors import ExitCode
from helixflow.settings.deployments import OpenAIDeployment
from helixflow.settings.models import ModelSettings
from tests.integration.launch.conftest import Running, until

SLEEP = "import time; time.sleep(3600)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(3600)"


def test_an_engine_is_started_listed_and_stopped(launcher: Running) -> None:
    peer = launcher.connect()
    started = peer.start("e", SLEEP, meta={"port": 7})
    assert started["ok"]
    (listed,) = peer.ask(op="list")["engines"]
    assert (listed["name"], listed["pid"], listed["meta"]) == ("e", started["pid"], {"port": 7})
    assert peer.ask(op="stop", name="e", grace_s=5)["found"]
    exited = peer.exit_of("e")
    assert (exited["status"], exited["stopping"], exited["meta"]) == (-signal.SIGTERM, True, {"port": 7})
    assert peer.ask(op="list")["engines"] == []
    assert not peer.ask(op="stop", name="e", grace_s=5)["found"]


def test_a_crash_is_told_to_everybody_with_the_last_lines(launcher: Running) -> None:
    first, second = launcher.connect(), launcher.connect()
    code = "import sys\nfor i in range(300): print('line', i)\nsys.stderr.write('0.00.1 E broken')\nsys.exit(3)"
    first.start("e", code)
    for peer in (first, second):
        exited = peer.exit_of("e")
        assert (exited["status"], exited["stopping"]) == (3, False)
        assert len(exited["tail"]) == 160
        assert exited["tail"][-2:] == ["line 299", "0.00.1 E broken"]


def test_output_becomes_log_lines_and_secrets_do_not(launcher: Running) -> None:
    peer = launcher.connect()
    code = "import os, sys; print('0.00.1 W', len(os.environ['KEY']), len(sys.stdin.read()))"
    peer.start("e", code, env={"KEY": "s3cret"}, stdin="hidden!")
    peer.exit_of("e")
    (record,) = [record for record in launcher.records("engine.output") if record["engine"] == "e"]
    assert (record["level"], record["line"]) == ("warning", "0.00.1 W 6 7")
    assert "s3cret" not in launcher.log_path.read_text()
    assert "hidden!" not in launcher.log_path.read_text()


def test_engines_do_not_inherit_the_platforms_own_secrets(launcher: Running) -> None:
    peer = launcher.connect()
    peer.start("e", "import os; print('HELIXFLOW_BOOTSTRAP_API_KEY' in os.environ)")
    assert peer.exit_of("e")["tail"] == ["False"]


def test_engines_do_not_inherit_the_secrets_of_providers(
    start_launcher: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "PROVIDER_KEY", "PROVIDER_ORG", "HARMLESS"):
        monkeypatch.setenv(name, "hidden")
    deployment = OpenAIDeployment(
        engine="openai",
        base_url="https://api.example.com/v1",
        api_key_env="PROVIDER_KEY",
        headers={"x-org": "org ${PROVIDER_ORG}"},
    )
    launcher = start_launcher(models=(ModelSettings(name="remote", deployments=(deployment,)),)).wait_serving()
    peer = launcher.connect()
    peer.start("e", "import os; print(sorted(name for name in os.environ if os.environ[name] == 'hidden'))")
    assert peer.exit_of("e")["tail"] == ["['HARMLESS']"]


def test_a_program_that_does_not_exist_ends_with_a_reason(launcher: Running) -> None:
    peer = launcher.connect()
    peer.ask(op="start", name="e", argv=["/nowhere/llama-server"])
    exited = peer.exit_of("e")
    assert exited["status"] == 127
    assert "No such file" in exited["tail"][-1]


def test_an_engine_that_ignores_sigterm_is_killed_after_its_grace(launcher: Running) -> None:
    peer = launcher.connect()
    peer.start("e", STUBBORN)
    until(lambda: any(record["line"] == "up" for record in launcher.records("engine.output")))
    peer.ask(op="stop", name="e", grace_s=0.2)
    assert peer.exit_of("e")["status"] == -signal.SIGKILL


def test_what_an_engine_leaves_in_its_group_is_swept(launcher: Running) -> None:
    peer = launcher.connect()
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {SLEEP!r}]).pid)"
    peer.start("e", code)
    orphan = int(peer.exit_of("e")["tail"][-1])
    until(lambda: orphan not in [process.pid for process in launcher.others()])


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"[1]\n",
        b'{"op": "fly"}\n',
        b'{"op": "start", "name": "x", "argv": []}\n',
        b'{"op": "start", "name": "x", "argv": ["a", 1]}\n',
        b'{"op": "start", "name": "x", "argv": ["a"], "env": {"a": 1}}\n',
        b'{"op": "stop", "name": "x", "grace_s": "soon"}\n',
    ],
)
def test_bad_input_is_answered_and_the_connection_stays(launcher: Running, line: bytes) -> None:
    peer = launcher.connect()
    peer.send(line)
    reply = peer.receive()
    assert not reply["ok"]
    assert reply["error"]
    assert peer.ask(op="list")["ok"]


def test_a_name_is_used_once(launcher: Running) -> None:
    peer = launcher.connect()
    assert peer.start("e", SLEEP)["ok"]
    assert "already" in peer.start("e", SLEEP)["error"]


def test_an_endless_line_is_cut_off_and_others_are_served(launcher: Running) -> None:
    greedy, other = launcher.connect(), launcher.connect()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        for _ in range(200):
            greedy.send(b"x" * 100_000)
    assert other.ask(op="list")["ok"]


def test_the_socket_is_its_owners_alone(launcher: Running) -> None:
    assert stat.S_IMODE(launcher.socket_path.stat().st_mode) == 0o600


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_everything(launcher: Running, number: int) -> None:
    launcher.connect().start("e", SLEEP)
    # What a control process that was killed leaves behind, and a shipper.
    (launcher.settings.run_dir / "auth.address").write_text("127.0.0.1:1")
    (launcher.settings.run_dir / "shipper.json").write_text("{}")
    launcher.process.send_signal(number)
    assert launcher.wait() == 0
    until(lambda: not launcher.others())
    assert [path.name for path in launcher.settings.run_dir.iterdir()] == []


def test_gateways_end_first_and_engines_last(launcher: Running) -> None:
    peer = launcher.connect()
    peer.start("e", SLEEP)
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.wait() == 0
    ends = [r.get("process") or r["engine"] for e in ("process.exited", "engine.exited") for r in launcher.records(e)]
    assert ends == ["gateway-0", "shipper", "control", "e"]


def test_a_shipper_that_does_not_end_is_killed_before_control_stops(start_launcher: Callable[..., Running]) -> None:
    launcher = start_launcher(shipper="stubborn").wait_serving()
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.wait() == 0
    assert [record["process"] for record in launcher.records("process.exited")] == ["gateway-0", "shipper", "control"]
    assert [record["phase"] for record in launcher.records("launcher.overdue")] == ["stopping_shipper"]


def test_a_second_signal_hurries(start_launcher: Callable[..., Running]) -> None:
    launcher = start_launcher(gateway="stubborn").wait_serving()
    launcher.connect().start("e", STUBBORN)
    launcher.process.send_signal(signal.SIGTERM)
    until((launcher.folder / "asked").exists)
    assert launcher.process.poll() is None, "the gateway drains"
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.process.wait(15) == 0, "sooner than the gateway may drain"
    until(lambda: not launcher.others())


def test_engines_can_be_started_while_gateways_drain(start_launcher: Callable[..., Running]) -> None:
    launcher = start_launcher(gateway="stubborn").wait_serving()
    peer = launcher.connect()
    launcher.process.send_signal(signal.SIGTERM)
    until((launcher.folder / "asked").exists)
    assert peer.start("e", SLEEP)["ok"], "a crashed engine is replaced for the requests that still run"


def test_killing_the_launcher_leaves_nothing(launcher: Running) -> None:
    peer = launcher.connect()
    peer.start("plain", SLEEP)
    # As where the kernel has no death signal: the shim stays and watches; and a shim within a shim.
    shim = [sys.executable, "-m", "helixflow.process.shim", "--parent"]
    nested = (
        "import os, subprocess, sys; "
        f"subprocess.run([*{shim!r}, str(os.getpid()), '--', sys.executable, '-c', {SLEEP!r}])"
    )
    program = [sys.executable, "-c", SLEEP]
    watched = f"import os; os.execv({sys.executable!r}, [*{shim!r}, str(os.getppid()), '--watch', '--', *{program!r}])"
    peer.start("nested", nested)
    peer.start("watched", watched)
    # launcher's children: control, gateway, shipper, three engines; and one more below each of the last two.
    until(lambda: len(launcher.others()) == 8)
    launcher.process.kill()
    until(lambda: not launcher.others())


def test_control_is_restarted_and_engines_survive_it(launcher: Running) -> None:
    peer = launcher.connect()
    pid = peer.start("e", SLEEP)["pid"]
    os.kill(launcher.pids("control")[0], signal.SIGKILL)
    until(lambda: len(launcher.pids("control")) == 2)
    assert [engine["pid"] for engine in launcher.connect().ask(op="list")["engines"]] == [pid]


def test_a_shipper_is_restarted_and_nothing_else(launcher: Running) -> None:
    os.kill(launcher.pids("shipper")[0], signal.SIGKILL)
    until(lambda: len(launcher.pids("shipper")) == 2)
    assert (len(launcher.pids("gateway-0")), len(launcher.pids("control"))) == (1, 1)


def test_nobody_is_refused_while_a_gateway_is_replaced(launcher: Running) -> None:
    first = launcher.call()
    os.kill(first, signal.SIGKILL)
    # Until it is gone, it may still accept.
    until(lambda: not psutil.pid_exists(first))
    second = launcher.call()
    assert second != first
    assert launcher.pids("gateway-0") == [first, second]


def test_a_service_that_says_why_it_cannot_start_is_not_restarted(start_launcher: Callable[..., Running]) -> None:
    launcher = start_launcher(control=f"exit {ExitCode.STORAGE.value}")
    assert launcher.wait() == ExitCode.STORAGE
    assert len(launcher.pids("control")) == 1
    assert len(launcher.records("launcher.gave_up")) == 1


def test_a_crash_loop_is_given_up(start_launcher: Callable[..., Running]) -> None:
    launcher = start_launcher(gateway="exit 1")
    assert launcher.wait() == ExitCode.UNAVAILABLE
    assert len(launcher.pids("gateway-0")) == 5
    (record,) = launcher.records("launcher.gave_up")
    assert "gateway-0" in record["reason"]
    until(lambda: not launcher.others())


def test_the_welcome_runs_once_when_everything_serves(start_launcher: Callable[..., Running], tmp_path: Path) -> None:
    marker = tmp_path / "welcomed"
    launcher = start_launcher(["/bin/sh", "-c", f"echo once >> {marker}"]).wait_serving()
    until(lambda: marker.exists() and marker.read_text())
    os.kill(launcher.pids("gateway-0")[0], signal.SIGKILL)
    until(lambda: len(launcher.records("process.ready")) == 4)
    assert marker.read_text() == "once\n"


def test_a_peer_that_does_not_read_is_dropped(launcher: Running) -> None:
    lazy = socket.socket(socket.AF_UNIX)
    lazy.connect(str(launcher.socket_path))
    lazy.setblocking(False)
    peer = launcher.connect()
    peer.start("e", SLEEP, meta={"blob": "x" * 500_000})
    sent = 0
    request = b'{"id": 1, "op": "list"}\n'
    try:
        while sent < 64:
            sent += lazy.send(request) // len(request)
        until(lambda: _is_closed(lazy))
    finally:
        lazy.close()
    assert peer.ask(op="list")["ok"]


def _is_closed(peer: socket.socket) -> bool:
    try:
        peer.send(b"\n")
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False


def test_control_that_cannot_come_back_yet_leaves_gateways_and_engines_alone(launcher: Running) -> None:
    pid = launcher.connect().start("e", SLEEP)["pid"]
    gateway = launcher.call()
    launcher.behave("control", f"exit {ExitCode.STORAGE.value}")
    os.kill(launcher.pids("control")[0], signal.SIGKILL)
    until(lambda: len(launcher.pids("control")) >= 3)
    assert launcher.call() == gateway
    launcher.behave("control", "")
    until(lambda: [r.get("process") for r in launcher.records("process.ready")].count("control") == 2)
    assert [engine["pid"] for engine in launcher.connect().ask(op="list")["engines"]] == [pid]
    assert launcher.records("launcher.gave_up") == []
