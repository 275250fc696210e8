"""What a model source says, and the contract of the modules that fetch one."""

import hashlib
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol
from urllib.parse import urlsplit

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.progress import Report

Kind = Literal["pypi", "hf", "file", "https"]

FORMS: Final = "pypi:NAME==VERSION#FILE, hf:OWNER/REPOSITORY[@REVISION]/FILE.gguf, file:/absolute/path.gguf or https://HOST/FILE.gguf"
_PYPI: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)#(.+)")
_HF: Final = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/(.+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Source:
    """One parsed source.

    | kind | locator | file | version |
    |---|---|---|---|
    | pypi | project | member of the wheel, or its unique base name | exact version |
    | hf | owner/repository | path in the repository | revision, "main" unless given |
    | file | absolute path | base name | "" |
    | https | URL | base name | "" |

    `text` is the canonical form; two sources are the same when their texts are.
    """

    kind: Kind
    locator: str
    file: str
    version: str
    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def key(self) -> str:
        """A file name for what belongs to this source."""
        return f"{self.kind}-{hashlib.sha256(self.text.encode()).hexdigest()[:32]}"


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """A file that was fetched into a workspace, and the SHA-256 (hex) of its bytes."""

    path: Path
    sha256: str


class Fetch(Protocol):
    """How one kind of source is fetched.

    `names` are the files wanted: the first is `source.file`, the others lie beside it. They are written under `work`,
    an empty folder that is removed afterwards; what a later run may resume from goes to `partial`. `descriptors` must
    be passed on to child processes: they keep the folder from being swept while a child still writes to it.
    Returns one file a name, in order. Raises `UserError`; an `OSError` while writing is passed on as it is.
    """

    def __call__(
        self,
        source: Source,
        names: Sequence[str],
        *,
        work: Path,
        partial: Path,
        descriptors: Sequence[int],
        progress: Report,
    ) -> list[FetchedFile]: ...


def parse_source(text: str) -> Source:
    """The source that `text` names. Raises `UserError` (CONFIG) that shows the known forms."""
    kind, colon, rest = text.strip().partition(":")
    if colon and rest and not _has_control(rest):
        if kind == "pypi":
            return _parse_pypi(text, rest)
        if kind == "hf":
            return _parse_hf(text, rest)
        if kind == "file":
            return _parse_file(text, rest)
        if kind in ("https", "http"):
            return _parse_url(text, kind, rest)
    raise _bad(text, "it is none of the known forms")


def is_loopback_host(host: str) -> bool:
    """Whether `host` is a literal loopback address or `localhost`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_allowed_url(url: str) -> bool:
    """Whether models may be fetched from `url`: over verified TLS, or without it from this machine itself."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return False
    if parts.scheme == "https":
        return bool(host)
    return parts.scheme == "http" and is_loopback_host(host)


def _parse_pypi(text: str, rest: str) -> Source:
    match = _PYPI.fullmatch(rest)
    if match is None:
        raise _bad(text, "a pypi: source needs an exact version and a file: pypi:NAME==VERSION#FILE")
    name, version, member = match.groups()
    if not _is_relative(member):
        raise _bad(text, "the file after # must be a path inside the wheel")
    return Source("pypi", name, member, version, f"pypi:{name}=={version}#{member}")


def _parse_hf(text: str, rest: str) -> Source:
    match = _HF.fullmatch(rest)
    if match is None:
        raise _bad(text, "an hf: source needs owner, repository and file: hf:OWNER/REPOSITORY[@REVISION]/FILE.gguf")
    repository, revision, file = match[1], match[2] or "main", match[3]
    if not _is_relative(file) or ".." in repository:
        raise _bad(text, "the file must be a path inside the repository")
    canonical = f"hf:{repository}/{file}" if revision == "main" else f"hf:{repository}@{revision}/{file}"
    return Source("hf", repository, file, revision, canonical)


def _parse_file(text: str, rest: str) -> Source:
    path = Path(rest[2:] if rest.startswith("///") else rest)
    if not path.is_absolute() or (rest.startswith("//") and not rest.startswith("///")):
        raise _bad(text, "a file: source needs an absolute path: file:/path/to/model.gguf")
    return Source("file", str(path), path.name, "", f"file:{path}")


def _parse_url(text: str, scheme: str, rest: str) -> Source:
    url = f"{scheme}:{rest}" if rest.startswith("//") else rest if rest.startswith("https://") else f"{scheme}://{rest}"
    if not is_allowed_url(url):
        raise _bad(text, "a download needs https:// and a host (http:// only for loopback addresses)")
    parts = urlsplit(url)
    name = Path(parts.path).name
    if not name or any(character.isspace() for character in url):
        raise _bad(text, "the URL must end in a file name and have no spaces")
    if parts.username is not None or parts.password is not None:
        raise _bad("https:…", "a URL must not carry a user name or password")
    return Source("https", url, name, "", url)


def _is_relative(path: str) -> bool:
    parts = path.split("/")
    return "\\" not in path and all(part not in ("", ".", "..") for part in parts)


def _has_control(text: str) -> bool:
    return any(ord(character) < 32 or ord(character) == 127 for character in text)


def _bad(text: str, reason: str) -> UserError:
    return UserError(f"model source {text!r}: {reason}. Known forms: {FORMS}", ExitCode.CONFIG)
