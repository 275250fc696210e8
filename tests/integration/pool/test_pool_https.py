"""Downloads over HTTP: resumed within a run and across runs, and never mixed from two versions."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.progress import PullProgress, ignore
from helixflow.pool.sources.https import fetch_https
from helixflow.pool.sources.source import FetchedFile, parse_source

DATA = bytes(range(256)) * 4096
Start = Callable[[dict[str, bytes]], Any]


class Cut(Exception):
    """A process that is killed in the middle of a download."""


def fetch(url: str, folder: Path, progress: Callable[[PullProgress], None] = ignore) -> FetchedFile:
    work, partial = folder / "work", folder / "partial"
    work.mkdir(exist_ok=True)
    partial.mkdir(exist_ok=True)
    waits: list[float] = []
    (file,) = fetch_https(
        parse_source(url), ["m.gguf"], work=work, partial=partial, descriptors=[], progress=progress, wait=waits.append
    )
    return file


def cut_at(limit: int) -> Callable[[PullProgress], None]:
    def progress(report: PullProgress) -> None:
        if report.done_bytes >= limit:
            raise Cut

    return progress


def check(file: FetchedFile, folder: Path, data: bytes = DATA) -> None:
    assert file.path.read_bytes() == data
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    assert list((folder / "partial").iterdir()) == []


def test_a_download_through_a_redirect(tmp_path: Path, file_server: Start) -> None:
    server = file_server({"/real": DATA})
    server.redirect["/m.gguf"] = "/real"
    seen: list[PullProgress] = []
    check(fetch(f"{server.base}/m.gguf", tmp_path, seen.append), tmp_path)
    assert seen[0] == PullProgress("downloading", 0, len(DATA))


def test_a_broken_connection_is_resumed_in_the_same_run(tmp_path: Path, file_server: Start) -> None:
    server = file_server({"/m.gguf": DATA})
    server.breaks, server.break_after = 3, 200_000
    check(fetch(f"{server.base}/m.gguf", tmp_path), tmp_path)
    assert [(asked, status) for _, _, asked, status in server.requests] == [
        (None, 200),
        ("bytes=200000-", 206),
        ("bytes=400000-", 206),
        ("bytes=600000-", 206),
    ]


def test_the_next_run_goes_on_where_a_killed_one_stopped(tmp_path: Path, file_server: Start) -> None:
    server = file_server({"/m.gguf": DATA})
    server.breaks, server.break_after = 1, 300_000
    with pytest.raises(Cut):
        fetch(f"{server.base}/m.gguf", tmp_path, cut_at(300_000))
    check(fetch(f"{server.base}/m.gguf", tmp_path), tmp_path)
    assert server.requests[-1][2:] == ("bytes=300000-", 206)


def test_a_file_that_changed_meanwhile_is_fetched_anew(tmp_path: Path, file_server: Start) -> None:
    server = file_server({"/m.gguf": DATA})
    server.breaks, server.break_after = 1, 300_000
    with pytest.raises(Cut):
        fetch(f"{server.base}/m.gguf", tmp_path, cut_at(300_000))
    server.files["/m.gguf"], server.etag = DATA[::-1], '"v2"'
    check(fetch(f"{server.base}/m.gguf", tmp_path), tmp_path, DATA[::-1])
    assert server.requests[-1][2:] == ("bytes=300000-", 200)


def test_without_a_strong_validator_nothing_is_resumed(tmp_path: Path, file_server: Start) -> None:
    server = file_server({"/m.gguf": DATA})
    server.etag = 'W/"v1"'
    server.breaks, server.break_after = 1, 300_000
    check(fetch(f"{server.base}/m.gguf", tmp_path), tmp_path)
    assert [asked for _, _, asked, _ in server.requests] == [None, None]


def test_a_server_that_only_breaks_is_given_up(tmp_path: Path, file_server: Start) -> None:
    server = file_server({"/m.gguf": DATA})
    server.breaks = 100
    with pytest.raises(UserError, match="connection ended") as caught:
        fetch(f"{server.base}/m.gguf", tmp_path)
    assert caught.value.exit_code is ExitCode.UNAVAILABLE
    assert len(server.requests) == 5


def test_what_is_not_there(tmp_path: Path, file_server: Start) -> None:
    server = file_server({})
    with pytest.raises(UserError, match="404") as caught:
        fetch(f"{server.base}/m.gguf", tmp_path)
    assert caught.value.exit_code is ExitCode.MODEL
    assert len(server.requests) == 1


def test_a_redirect_to_plain_http_elsewhere_is_refused(tmp_path: Path, file_server: Start) -> None:
    server = file_server({})
    server.redirect["/m.gguf"] = "http://192.0.2.1/m.gguf"
    with pytest.raises(UserError, match="not https"):
        fetch(f"{server.base}/m.gguf", tmp_path)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot download") as caught:
        fetch("http://127.0.0.1:1/m.gguf", tmp_path)
    assert caught.value.exit_code is ExitCode.UNAVAILABLE
