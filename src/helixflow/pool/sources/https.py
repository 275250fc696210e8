"""Models at a URL."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.disk import hash_file
from helixflow.pool.progress import PullProgress, Report, Throttle
from helixflow.pool.sources.download import Remote, download
from helixflow.pool.sources.source import FetchedFile, Source


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
    """Downloads the URL; see `Fetch` and `download`."""
    if len(names) != 1:
        raise UserError(f"{source}: a model that needs several files cannot come from a URL", ExitCode.CONFIG)
    data, target = partial / source.key, work / source.file
    download(Remote(source.locator), data, progress, wait=wait)
    data.rename(target)
    throttle, total = Throttle(progress), target.stat().st_size
    return [FetchedFile(target, hash_file(target, lambda done: throttle.send(PullProgress("verifying", done, total))))]
