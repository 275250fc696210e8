"""Models on the Hugging Face hub or a mirror (`HF_ENDPOINT`): `hf:OWNER/REPOSITORY[@REVISION]/FILE`.

The only module that imports `huggingface_hub`, and only when such a source is fetched. The library says where a file is
and what it is (endpoint, token and proxies are its own settings); the bytes come through `download`, because the
library, as of 2.4, throws away what an interrupted run has brought.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.disk import hash_file
from helixflow.pool.progress import PullProgress, Report, Throttle
from helixflow.pool.sources.download import Remote, download
from helixflow.pool.sources.source import FetchedFile, Source

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class _HubFile:
    """A file as the hub describes it. `etag` is the SHA-256 for files in large storage, else a git object id."""

    remote: Remote
    etag: str


def fetch_hf(
    source: Source,
    names: Sequence[str],
    *,
    work: Path,
    partial: Path,
    descriptors: Sequence[int],
    progress: Report,
) -> list[FetchedFile]:
    """Downloads the files of one revision; see `Fetch`. Resumes across runs while the hub's file stays the same."""
    folder = source.file.rpartition("/")[0]
    files = []
    for index, wanted in enumerate((source.file, *(f"{folder}/{name}" if folder else name for name in names[1:]))):
        progress(PullProgress("downloading", 0, None))
        found = _look_up(source, wanted)
        data, target = partial / f"{source.key}-{index}", work / wanted.rsplit("/", 1)[-1]
        download(found.remote, data, progress)
        data.rename(target)
        sha256 = _hash(target, progress)
        if _SHA256.fullmatch(found.etag) and sha256 != found.etag:
            raise UserError(f"{source}: wrong SHA-256: the hub says {found.etag}, got {sha256}", ExitCode.MODEL)
        files.append(FetchedFile(target, sha256))
    return files


def _look_up(source: Source, wanted: str) -> _HubFile:
    import httpx2
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    try:
        url = hf_hub_url(source.locator, wanted, revision=source.version)
        metadata = get_hf_file_metadata(url)
    except HFValidationError as exc:
        raise UserError(f"{source}: {source.locator!r} cannot be a repository of the hub", ExitCode.CONFIG) from exc
    except RevisionNotFoundError as exc:
        raise UserError(f"{source}: there is no revision {source.version!r}", ExitCode.MODEL) from exc
    except RepositoryNotFoundError as exc:
        raise UserError(
            f"{source}: there is no such repository, or it is private and needs a token (HF_TOKEN)", ExitCode.MODEL
        ) from exc
    except EntryNotFoundError as exc:
        raise UserError(f"{source}: the repository has no file {wanted}", ExitCode.MODEL) from exc
    except HfHubHTTPError as exc:
        raise UserError(f"{source}: the hub answered {exc.response.status_code}", ExitCode.UNAVAILABLE) from exc
    except (httpx2.HTTPError, OSError) as exc:
        raise UserError(f"{source}: the hub cannot be reached: {exc}", ExitCode.UNAVAILABLE) from exc
    headers: dict[str, str] = {}
    if urlsplit(metadata.location).netloc == urlsplit(url).netloc:
        headers = {name: value for name, value in build_hf_headers().items() if name.lower() == "authorization"}
    etag = metadata.etag or ""
    # Storage URLs are signed anew each time: what was begun is known again by the content's own name.
    return _HubFile(Remote(metadata.location, headers, content_id=etag and f"{source.text} {etag}"), etag)


def _hash(path: Path, progress: Report) -> str:
    throttle, total = Throttle(progress), path.stat().st_size
    return hash_file(path, lambda done: throttle.send(PullProgress("verifying", done, total)))
