"""Models on the Hugging Face hub or a mirror (`HF_ENDPOINT`): `hf:OWNER/REPOSITORY[@REVISION]/FILE`.

The only module that imports `huggingface_hub`, and only when such a source is fetched. Its own settings hold (token,
endpoint, proxies). An interrupted download resumes in the next run from the same folder.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.disk import hash_file, require_space
from helixflow.pool.progress import PullProgress, Report, Throttle
from helixflow.pool.sources.source import FetchedFile, Source


def fetch_hf(
    source: Source,
    names: Sequence[str],
    *,
    work: Path,
    partial: Path,
    descriptors: Sequence[int],
    progress: Report,
) -> list[FetchedFile]:
    """Downloads the files of one revision; see `Fetch`."""
    folder = source.file.rpartition("/")[0]
    local = partial / source.key
    local.mkdir(exist_ok=True)
    files = []
    for wanted in (source.file, *(f"{folder}/{name}" if folder else name for name in names[1:])):
        fetched = _download(source, wanted, local, progress)
        target = work / wanted.rsplit("/", 1)[-1]
        fetched.rename(target)
        files.append(FetchedFile(target, _hash(target, progress)))
    shutil.rmtree(local)
    return files


def _download(source: Source, wanted: str, local: Path, progress: Report) -> Path:
    import httpx2
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.file_download import get_hf_file_metadata

    progress(PullProgress("downloading", 0, None))
    try:
        metadata = get_hf_file_metadata(hf_hub_url(source.locator, wanted, revision=source.version))
        if metadata.size is not None:
            require_space(local, metadata.size)
        path = hf_hub_download(
            source.locator,
            wanted,
            revision=source.version,
            local_dir=local,
            tqdm_class=_progress_class(progress),
        )
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
    except (httpx2.HTTPError, ConnectionError, TimeoutError) as exc:
        raise UserError(f"{source}: the hub cannot be reached: {exc}", ExitCode.UNAVAILABLE) from exc
    return Path(path)


def _progress_class(progress: Report) -> type[Any]:
    """A stand-in for tqdm's bar that passes the numbers on and prints nothing."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    throttle = Throttle(progress)

    class SilentBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            # `name` is the hub's own addition to tqdm's options.
            options.pop("name", None)
            self._done = int(options.get("initial", 0) or 0)
            self._total = options.get("total")
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            throttle.send(PullProgress("downloading", self._done, int(self._total) if self._total else None))
            return None

    return SilentBar


def _hash(path: Path, progress: Report) -> str:
    throttle, total = Throttle(progress), path.stat().st_size
    return hash_file(path, lambda done: throttle.send(PullProgress("verifying", done, total)))
