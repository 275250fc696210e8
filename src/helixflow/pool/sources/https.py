"""Models at a URL; downloads resume across runs: what came is kept with the validator (ETag, date) it came under."""

import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from email.message import Message
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.disk import hash_file, require_space
from helixflow.pool.progress import PullProgress, Report, Throttle
from helixflow.pool.sources.source import FetchedFile, Source, is_allowed_url

_TIMEOUT_S: Final = 30.0
_ATTEMPTS: Final = 5
_READ_BYTES: Final = 1 << 16
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_RETRIED_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


class _Validator(msgspec.Struct, frozen=True):
    """Under which condition the bytes already here are a prefix of what the URL gives. `total` in bytes, if known."""

    url: str
    if_range: str
    total: int | None


class _Interrupted(Exception):
    """The connection failed, or the server asked to try later; what has come is kept."""


def fetch_https(
    source: Source,
    names: Sequence[str],
    *,
    work: Path,
    partial: Path,
    descriptors: Sequence[int],
    progress: Report,
    wait: Callable[[float], None] = time.sleep,
) -> list[FetchedFile]:
    """Downloads the URL; see `Fetch`. Up to five tries in a row that bring nothing, 30 s of silence end each."""
    if len(names) != 1:
        raise UserError(f"{source}: a model that needs several files cannot come from a URL", ExitCode.CONFIG)
    data, note = partial / source.key, partial / f"{source.key}.json"
    failures = 0
    while True:
        before = _size(data)
        try:
            _transfer(source.locator, data, note, progress)
            break
        except _Interrupted as exc:
            failures = 1 if _size(data) > before else failures + 1
            if failures >= _ATTEMPTS:
                raise UserError(f"cannot download {source.locator}: {exc}", ExitCode.UNAVAILABLE) from exc
            wait(min(2.0 ** (failures - 1), 8.0))
    target = work / source.file
    data.rename(target)
    note.unlink(missing_ok=True)
    throttle, total = Throttle(progress), target.stat().st_size
    return [FetchedFile(target, hash_file(target, lambda done: throttle.send(PullProgress("verifying", done, total))))]


def _transfer(url: str, data: Path, note: Path, progress: Report) -> None:
    """Brings `data` to completion, or raises `_Interrupted` with what came kept."""
    known = _read_note(note, url)
    if known is None:
        data.unlink(missing_ok=True)
    start = _size(data)
    if known is not None and known.total is not None and start == known.total:
        return
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "helixflow"})  # noqa: S310
    if known is not None and start > 0:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", known.if_range)
    try:
        # Proxies and CA certificates as the standard library finds them; the scheme was checked, redirects are too.
        with urllib.request.build_opener(_CheckedRedirects).open(request, timeout=_TIMEOUT_S) as response:
            _receive(response, url, data, note, start, progress)
    except urllib.error.HTTPError as exc:
        exc.close()
        if exc.code == 416:
            data.unlink(missing_ok=True)
            raise _Interrupted("the server no longer has what was begun") from exc
        if exc.code in _RETRIED_STATUS:
            raise _Interrupted(f"the server answered {exc.code} {exc.reason}") from exc
        raise UserError(f"cannot download {url}: the server answered {exc.code} {exc.reason}", ExitCode.MODEL) from exc
    except urllib.error.URLError as exc:
        raise _Interrupted(str(exc.reason)) from exc
    except (http.client.HTTPException, ConnectionError, TimeoutError) as exc:
        raise _Interrupted(str(exc) or type(exc).__name__) from exc


def _receive(response: Any, url: str, data: Path, note: Path, start: int, progress: Report) -> None:
    if response.status == 206:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            data.unlink(missing_ok=True)
            raise _Interrupted("the server sent another range than was asked for")
        total: int | None = int(match[3])
    else:
        start = 0
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else None
        _keep_validator(response.headers, url, total, note)
    if total is not None:
        require_space(data.parent, total - start)
    with data.open("ab" if start else "wb") as file:
        done = _copy(response, file, start, total, progress)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and done != total:
        raise _Interrupted(f"the connection ended after {done} of {total} bytes")


def _copy(response: Any, file: IO[bytes], start: int, total: int | None, progress: Report) -> int:
    done, throttle = start, Throttle(progress)
    progress(PullProgress("downloading", done, total))
    while chunk := response.read(_READ_BYTES):
        done += len(chunk)
        if total is not None and done > total:
            raise _Interrupted("the server sent more than it announced")
        file.write(chunk)
        throttle.send(PullProgress("downloading", done, total))
    return done


def _keep_validator(headers: Message, url: str, total: int | None, note: Path) -> None:
    """Notes what a later run may resume under. A weak ETag promises nothing about bytes (RFC 9110, section 13.1.5)."""
    etag = headers.get("ETag", "")
    validator = etag if etag.startswith('"') else headers.get("Last-Modified", "")
    note.unlink(missing_ok=True)
    if validator and "\n" not in validator and "\r" not in validator:
        note.write_bytes(msgspec.json.encode(_Validator(url, validator, total)))


def _read_note(note: Path, url: str) -> _Validator | None:
    try:
        known = msgspec.json.decode(note.read_bytes(), type=_Validator)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return known if known.url == url else None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects only to where a model may come from: never from TLS to plain HTTP of another machine."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not is_allowed_url(newurl):
            raise UserError(
                f"cannot download {req.full_url}: it redirects to {newurl}, which is not https", ExitCode.MODEL
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)
