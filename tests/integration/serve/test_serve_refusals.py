"""`helixflow serve` that cannot serve: one clear line, its exit code, nothing left running or half-written."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from helixflow.core.errors import ExitCode
from helixflow.pool.manifest import StoredModel
from tests.harness.node import HELIXFLOW, Node, environment, eventually, fill_store, until

LIMIT_S = 180


def serve(
    data_dir: Path, *words: str, before: tuple[str, ...] = (), **settings: str
) -> "subprocess.CompletedProcess[str]":
    command = [*before, str(HELIXFLOW), *words, "serve"]
    environ = environment(data_dir, **settings)
    if "--config" in words:
        # It would hide what the file says.
        environ.pop("HELIXFLOW_GATEWAY__HTTP_PORT")
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def refusal(done: "subprocess.CompletedProcess[str]", code: ExitCode) -> str:
    """The one line of a refused start, checked to be that."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("helixflow: ")
    return line.removeprefix("helixflow: ")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[gateway]\nhttp_prot = 1\n", 2, ["gateway.http_prot", "unknown key"]),
        ("# a comment\n\n[gateway]\nhttp_port = 70000\n", 4, ["gateway.http_port", "65535"]),
        ('[gateway]\nhost = "0.0.0.0"\n', 2, ["gateway.host", "loopback"]),
        ('[[models]]\nname = "m"\n[[models.deployments]]\nengine = "vlllm"\n', 4, ["'vlllm'", "llama_cpp", "openai"]),
        ('[[models]]\nname = "m"\n[[models.deployments]]\nsource = "file:x"\n', 3, ["engine"]),
        ('[[models]]\nname = "a"\n[[models]]\nname = "a"\n', None, ["'a'", "twice"]),
        ("[gateway\n", None, ["TOML", "line 1"]),
    ],
)
def test_a_wrong_setting_is_named_with_file_and_line(
    tmp_path: Path, text: str, line: int | None, words: list[str]
) -> None:
    config = tmp_path / "h.toml"
    config.write_text(text)
    said = refusal(serve(tmp_path / "data", "--config", str(config)), ExitCode.CONFIG)
    assert said.startswith(f"{config}:{line}: " if line else f"{config}:")
    assert all(word in said for word in words), said
    assert not (tmp_path / "data").exists()


def test_a_wrong_variable_is_named(tmp_path: Path) -> None:
    said = refusal(serve(tmp_path / "data", HELIXFLOW_GATEWAY__HTTP_PORT="x"), ExitCode.CONFIG)
    assert "HELIXFLOW_GATEWAY__HTTP_PORT" in said


def test_a_malformed_bootstrap_key_is_refused_and_not_repeated(tmp_path: Path, chat_model: StoredModel) -> None:
    fill_store(tmp_path / "data", chat_model)
    done = serve(tmp_path / "data", HELIXFLOW_BOOTSTRAP_API_KEY="hfk_mistyped")
    assert done.returncode == ExitCode.CONFIG
    assert "HELIXFLOW_BOOTSTRAP_API_KEY" in done.stderr
    assert "mistyped" not in done.stderr


def test_a_busy_port_is_exit_4(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = refusal(serve(tmp_path / "data", HELIXFLOW_GATEWAY__HTTP_PORT=port), ExitCode.PORT_BUSY)
    assert port in said
    assert "--http-port" in said


def test_a_data_dir_that_cannot_be_made_is_exit_7(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refusal(serve(tmp_path / "file" / "data"), ExitCode.STORAGE)
    assert str(tmp_path / "file") in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_data_dir_without_permission_is_exit_7(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o500)
    assert "ermission" in refusal(serve(tmp_path / "theirs" / "data"), ExitCode.STORAGE)


def model_config(folder: Path, model: Path) -> Path:
    config = folder / "h.toml"
    config.write_text(
        f'[[models]]\nname = "m"\n[[models.deployments]]\nengine = "llama_cpp"\nsource = "file:{model}"\n'
    )
    return config


@pytest.mark.parametrize("content", [b"", b"not a model", b"GGUF\x03\0\0\0", "cut short"])
def test_what_is_no_model_is_exit_5(tmp_path: Path, content: bytes | str, chat_model: StoredModel) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(content if isinstance(content, bytes) else chat_model.path.read_bytes()[:60_000_000])
    config = model_config(tmp_path, model)
    done = serve(tmp_path / "data", "--config", str(config))
    assert done.returncode == ExitCode.MODEL, done.stderr
    assert str(model) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "data" / "models" / "manifests").iterdir()) == []


async def test_a_model_that_no_engine_can_load_is_failed_and_says_why(tmp_path: Path, chat_model: StoredModel) -> None:
    """Its head is in order, so that only the engine can find out."""
    model = tmp_path / "m.gguf"
    content = chat_model.path.read_bytes()
    architecture = content.index(b"llama", content.index(b"general.architecture"))
    model.write_bytes(content[:architecture] + b"lxxma" + content[architecture + 5 :])
    node = Node(tmp_path / "data", HELIXFLOW_CONFIG=str(model_config(tmp_path, model)))
    try:
        (failed,) = await eventually(lambda: node.records("deployment.failed"), LIMIT_S)
        assert "lxxma" in failed["cause"]
        node.find_port()
        await node.until_states({"m/llama_cpp-0": "failed"})
        assert (await node.ask("GET", "/readyz")).status == 503
        answer = await node.chat(model="m")
        assert answer.status == 502
        assert int(answer.headers["retry-after"]) >= 1
    finally:
        node.close()


def on_small_disk(folder: Path, size_kib: int) -> tuple[str, ...]:
    """A prefix that runs a command with a small disk of its own at `folder`, gone with the command."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root on Linux to mount a small disk")
    folder.mkdir()
    mount = f"mount -t tmpfs -o size={size_kib}k none '{folder}' || exit 99; exec \"$@\""
    if subprocess.run(["unshare", "--mount", "sh", "-c", mount, "sh", "true"], check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    return ("unshare", "--mount", "sh", "-c", mount, "sh")


def test_no_room_for_the_model_is_told_before_it_is_fetched(tmp_path: Path) -> None:
    before = on_small_disk(tmp_path / "data", 4096)
    done = serve(tmp_path / "data", before=before)
    assert done.returncode == ExitCode.STORAGE, done.stderr
    assert "290.0 MB needed" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_no_room_for_the_database_is_exit_7(tmp_path: Path, chat_model: StoredModel) -> None:
    before = on_small_disk(tmp_path / "small", 16)
    config = model_config(tmp_path, chat_model.path)
    done = serve(tmp_path / "small" / "data", "--config", str(config), before=before)
    assert done.returncode == ExitCode.STORAGE, done.stderr
    assert "Traceback" not in done.stderr
    assert "full" in done.stderr or "space" in done.stderr
    until(lambda: not (tmp_path / "small" / "data").exists())
