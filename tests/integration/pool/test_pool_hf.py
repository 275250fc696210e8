"""`hf:` sources against a hub of our own on loopback, in a process of its own: the library reads HF_ENDPOINT once."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helixflow.core.errors import ExitCode

Start = Callable[[dict[str, bytes]], Any]

DATA = bytes(range(256)) * 40960
COMMIT = "0123456789abcdef0123456789abcdef01234567"

FETCH = """
import json, os, sys
from pathlib import Path
from helixflow.core.errors import UserError
from helixflow.pool.sources.hf import fetch_hf
from helixflow.pool.sources.source import parse_source

source, root = parse_source(sys.argv[1]), Path(sys.argv[2])
work, partial = root / "work", root / "partial"
work.mkdir(exist_ok=True)
partial.mkdir(exist_ok=True)
seen = []

def note(report):
    seen.append(report)
    if report.done_bytes >= int(sys.argv[3]):
        print(json.dumps({"killed": True}), flush=True)
        os._exit(0)

try:
    files = fetch_hf(source, [source.file], work=work, partial=partial, descriptors=[], progress=note)
except UserError as error:
    print(json.dumps({"error": error.message, "code": int(error.exit_code)}))
else:
    done = [report.done_bytes for report in seen if report.phase == "downloading"]
    print(json.dumps({"path": str(files[0].path), "sha256": files[0].sha256, "done": done}))
"""


def run(endpoint: str, source: str, folder: Path, *, kill_at: int = 1 << 60, token: str = "") -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    if token:
        environment["HF_TOKEN"] = token
    ended = subprocess.run(
        [sys.executable, "-c", FETCH, source, str(folder), str(kill_at)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    answer: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return answer


def start_hub(file_server: Start, revision: str = "main") -> Any:
    server = file_server({f"/owner/repo/resolve/{revision}/sub/m.gguf": DATA})
    server.etag = f'"{hashlib.sha256(DATA).hexdigest()}"'
    server.extra_headers = {"X-Repo-Commit": COMMIT}
    return server


def test_a_file_of_a_revision(tmp_path: Path, file_server: Start) -> None:
    server = start_hub(file_server, "v1.0")
    answer = run(server.base, "hf:owner/repo@v1.0/sub/m.gguf", tmp_path)
    assert Path(answer["path"]).read_bytes() == DATA
    assert answer["sha256"] == hashlib.sha256(DATA).hexdigest()
    assert answer["done"][-1] > 0
    assert list((tmp_path / "partial").iterdir()) == []


def test_the_next_run_resumes(tmp_path: Path, file_server: Start) -> None:
    server = start_hub(file_server)
    server.breaks, server.break_after = 1, 5_000_000
    killed = run(server.base, "hf:owner/repo/sub/m.gguf", tmp_path, kill_at=5_000_000)
    assert killed == {"killed": True}
    server.requests.clear()
    second = run(server.base, "hf:owner/repo/sub/m.gguf", tmp_path)
    assert second["sha256"] == hashlib.sha256(DATA).hexdigest()
    assert ("bytes=5000000-", 206) in [(asked, status) for _, _, asked, status in server.requests]


def test_bytes_that_are_not_what_the_hub_says(tmp_path: Path, file_server: Start) -> None:
    server = start_hub(file_server)
    server.etag = f'"{"0" * 64}"'
    answer = run(server.base, "hf:owner/repo/sub/m.gguf", tmp_path)
    assert answer["code"] == ExitCode.MODEL
    assert "wrong SHA-256" in answer["error"]


def test_the_token_goes_to_the_hub_and_not_to_its_storage(tmp_path: Path, file_server: Start) -> None:
    storage = start_hub(file_server)
    hub = start_hub(file_server)
    hub.redirect["/owner/repo/resolve/main/sub/m.gguf"] = f"{storage.base}/owner/repo/resolve/main/sub/m.gguf"
    hub.extra_redirect_headers = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": hub.etag, "X-Linked-Size": str(len(DATA))}
    answer = run(hub.base, "hf:owner/repo/sub/m.gguf", tmp_path, token="hf_secret")
    assert answer["sha256"] == hashlib.sha256(DATA).hexdigest()
    assert "Bearer hf_secret" in hub.authorizations
    assert set(storage.authorizations) == {None}


def test_a_file_that_is_not_there(tmp_path: Path, file_server: Start) -> None:
    answer = run(start_hub(file_server).base, "hf:owner/repo/other.gguf", tmp_path)
    assert answer["code"] == ExitCode.MODEL
    assert "no file other.gguf" in answer["error"]


def test_no_hub(tmp_path: Path) -> None:
    answer = run("http://127.0.0.1:1", "hf:owner/repo/m.gguf", tmp_path)
    assert answer["code"] == ExitCode.UNAVAILABLE
    assert "cannot be reached" in answer["error"]


@pytest.mark.parametrize("source", ["hf:owner/re--po/x.gguf", "hf:owner/repo.git/x.gguf"])
def test_a_repository_that_the_library_does_not_accept(tmp_path: Path, source: str) -> None:
    answer = run("http://127.0.0.1:1", source, tmp_path)
    assert answer["code"] == ExitCode.CONFIG
    assert "cannot be a repository of the hub" in answer["error"]
