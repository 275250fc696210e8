"""A loopback server of files that can break off, and the original files of the embedding model."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from helixflow.pool.catalogue import Catalogue
from helixflow.pool.progress import ignore
from helixflow.pool.sources.pypi import fetch_pypi
from helixflow.pool.sources.source import parse_source


@dataclass
class FileServer:
    """Serves `files` by path. `break_after` bytes of a body the connection is cut, as often as `breaks` says.

    `requests` are (method, path, Range, status) as they were answered.
    """

    files: dict[str, bytes]
    etag: str = '"v1"'
    break_after: int = 0
    breaks: int = 0
    redirect: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None, int]] = field(default_factory=list)
    extra_headers: dict[str, str] = field(default_factory=dict)
    extra_redirect_headers: dict[str, str] = field(default_factory=dict)
    authorizations: list[str | None] = field(default_factory=list)
    base: str = ""


class FileRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: FileServer

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.files.authorizations.append(self.headers.get("Authorization"))
        if path in self.files.redirect:
            self.reply(
                302, {"Location": self.files.redirect[path], "Content-Length": "0", **self.files.extra_redirect_headers}
            )
            return
        data = self.files.files.get(path)
        if data is None:
            self.reply(404, {"Content-Length": "0", "X-Error-Code": "EntryNotFound"})
            return
        asked = self.headers.get("Range")
        headers = {"ETag": self.files.etag, "Accept-Ranges": "bytes", **self.files.extra_headers}
        status, start = 200, 0
        if asked is not None and self.headers.get("If-Range", self.files.etag) == self.files.etag:
            status, start = 206, int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        headers["Content-Length"] = str(len(data) - start)
        self.reply(status, headers)
        if not body:
            return
        if self.files.breaks:
            self.files.breaks -= 1
            self.wfile.write(data[start : start + self.files.break_after])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(data[start:])

    def reply(self, status: int, headers: dict[str, str]) -> None:
        self.files.requests.append((self.command, self.path, self.headers.get("Range"), status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the tests look at `requests`."""


@contextmanager
def serve(files: FileServer) -> Iterator[FileServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (FileRequest,), {"files": files}))
    files.base = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def file_server() -> Iterator[Callable[[dict[str, bytes]], FileServer]]:
    """Starts a server for some files; several may run."""
    running: list[Any] = []

    def start(files: dict[str, bytes]) -> FileServer:
        context = serve(FileServer(files))
        running.append(context)
        return context.__enter__()

    yield start
    for context in running:
        context.__exit__(None, None, None)


@pytest.fixture(scope="session")
def original_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the embedding model's original files, checked against the catalogue; kept between runs."""
    spec = Catalogue.load().find("all-minilm-l6-v2")
    assert spec is not None and spec.conversion is not None
    wanted = {"model.safetensors": spec.sha256, **spec.conversion.inputs}
    folder = Path.home() / ".cache" / "helixflow-tests" / "all-minilm-l6-v2"
    if all((folder / name).is_file() for name in wanted):
        digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in wanted}
        if digests == wanted:
            return folder
    work = tmp_path_factory.mktemp("original")
    files = fetch_pypi(
        parse_source(spec.source), list(wanted), work=work, partial=work, descriptors=[], progress=ignore
    )
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        temporary = folder / f".{work.parent.name}.{file.path.name}"
        temporary.write_bytes(file.path.read_bytes())
        temporary.replace(folder / file.path.name)
    return folder
