"""Downloads that resume across runs: what came is kept with the validator (ETag, date) it came under."""

import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.disk import require_space
from helixflow.pool.progress import PullProgress, Report, Throttle
from helixflow.pool.sources.source import is_allowed_url

_TIMEOUT_S: Final = 30.0
_ATTEMPTS: Final = 5
_READ_BYTES: Final = 1 << 16
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_RETRIED_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


class _Validator(msgspec.Struct, frozen=True):
    """When the bytes already here begin what is to come. `subject` is the content id or URL, `total` bytes."""

    subject: str
    if_range: str
    total: int | None


class _Interrupted(Exception):
    """The connection failed, or the server asked to try later; what has come is kept."""


@dataclass(frozen=True, slots=True)
class Remote:
    """What to download. `headers` go to the URL's own host only, never to another one it redirects to.

    `content_id` names the bytes, whatever URL they come from today; without it a resume rests on the server's word.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    content_id: str = ""

    @property
    def shown(self) -> str:
        """The URL without its query, which may be a signature."""
        return self.url.partition("?")[0]


def download(remote: Remote, data: Path, progress: Report, *, wait: Callable[[float], None] = time.sleep) -> None:
    """Brings `data` to completion, going on from what an earlier run left there (`data` and `data`.json).

    Gives up after five tries in a row that bring nothing; 30 s of silence end a try. Raises `UserError` (UNAVAILABLE,
    MODEL, STORAGE). The caller moves `data` away; what is left of a failure is resumed next time.
    """
    note = note_path(data)
    failures = 0
    while True:
        before = _size(data)
        try:
            _transfer(remote, data, note, progress)
            break
        except _Interrupted as exc:
            failures = 1 if _size(data) > before else failures + 1
            if failures >= _ATTEMPTS:
                raise UserError(f"cannot download {remote.shown}: {exc}", ExitCode.UNAVAILABLE) from exc
            wait(min(2.0 ** (failures - 1), 8.0))
    note.unlink(missing_ok=True)


def note_path(data: Path) -> Path:
    """Where it is noted what `data` is a part of."""
    return data.with_name(f"{data.name}.json")


def _transfer(remote: Remote, data: Path, note: Path, progress: Report) -> None:
    """Brings `data` to completion, or raises `_Interrupted` with what came kept."""
    url = remote.url
    known = _read_note(note, remote.content_id or url)
    if known is None:
        data.unlink(missing_ok=True)
    start = _size(data)
    if known is not None and known.total is not None and start == known.total:
        return
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "helixflow"})  # noqa: S310
    if known is not None and start > 0:
        request.add_header("Range", f"bytes={start}-")
        if known.if_range:
            request.add_header("If-Range", known.if_range)
    for name, value in remote.headers.items():
        # Unredirected: a token for the hub is none of its storage provider's business.
        request.add_unredirected_header(name, value)
    try:
        # Proxies and CA certificates as the standard library finds them; the scheme was checked, redirects are too.
        with urllib.request.build_opener(_CheckedRedirects).open(request, timeout=_TIMEOUT_S) as response:
            _receive(response, remote, data, note, start, progress)
    except urllib.error.HTTPError as exc:
        exc.close()
        if exc.code == 416:
            data.unlink(missing_ok=True)
            raise _Interrupted("the server no longer has what was begun") from exc
        if exc.code in _RETRIED_STATUS:
            raise _Interrupted(f"the server answered {exc.code} {exc.reason}") from exc
        raise UserError(
            f"cannot download {remote.shown}: the server answered {exc.code} {exc.reason}", ExitCode.MODEL
        ) from exc
    except urllib.error.URLError as exc:
        raise _Interrupted(str(exc.reason)) from exc
    except (http.client.HTTPException, ConnectionError, TimeoutError) as exc:
        raise _Interrupted(str(exc) or type(exc).__name__) from exc


def _receive(response: Any, remote: Remote, data: Path, note: Path, start: int, progress: Report) -> None:
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
        _keep_validator(response.headers, remote, total, note)
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


def _keep_validator(headers: Message, remote: Remote, total: int | None, note: Path) -> None:
    """Notes what a later run may resume under. A weak ETag promises nothing about bytes (RFC 9110, section 13.1.5)."""
    etag = headers.get("ETag", "")
    validator = etag if etag.startswith('"') else headers.get("Last-Modified", "")
    note.unlink(missing_ok=True)
    if remote.content_id:
        note.write_bytes(msgspec.json.encode(_Validator(remote.content_id, "", total)))
    elif validator and "\n" not in validator and "\r" not in validator:
        note.write_bytes(msgspec.json.encode(_Validator(remote.url, validator, total)))


def _read_note(note: Path, subject: str) -> _Validator | None:
    try:
        known = msgspec.json.decode(note.read_bytes(), type=_Validator)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return known if known.subject == subject else None


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
            begun, target = req.full_url.partition("?")[0], newurl.partition("?")[0]
            raise UserError(f"cannot download {begun}: it redirects to {target}, which is not https", ExitCode.MODEL)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
