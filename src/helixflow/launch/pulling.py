"""Pulling the models that must be there before serving, with a bar on a terminal and plain lines elsewhere."""

import sys
from collections.abc import Callable, Iterable
from typing import Final, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from helixflow.pool.catalogue import ModelSpec
from helixflow.pool.progress import PullProgress
from helixflow.pool.store import ModelStore, StoredModel

_STEP_PERCENT: Final = 20


def pull_all(store: ModelStore, specs: Iterable[ModelSpec], *, stream: TextIO | None = None) -> list[StoredModel]:
    """Every model of `specs`, fetched where it is not in the store yet. Raises `UserError` as the store does."""
    stream = stream if stream is not None else sys.stderr
    pull = _pull_with_bar if stream.isatty() else _pull_with_lines
    return [pull(store, spec, stream) for spec in specs]


def _pull_with_bar(store: ModelStore, spec: ModelSpec, stream: TextIO) -> StoredModel:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=stream), transient=True) as bars:
        bar = bars.add_task(f"{spec.name}: checking", total=None, visible=False)

        def report(progress: PullProgress) -> None:
            bars.update(
                bar,
                description=f"{spec.name}: {progress.phase}",
                completed=progress.done_bytes,
                total=progress.total_bytes,
                visible=True,
            )

        return store.pull(spec, report)


def _pull_with_lines(store: ModelStore, spec: ModelSpec, stream: TextIO) -> StoredModel:
    return store.pull(spec, _line_writer(spec.name, stream))


def _line_writer(name: str, stream: TextIO) -> Callable[[PullProgress], None]:
    """One line when a phase begins and one for every `_STEP_PERCENT` of it."""
    written: set[tuple[str, int]] = set()

    def report(progress: PullProgress) -> None:
        percent = 100 * progress.done_bytes // progress.total_bytes if progress.total_bytes else 0
        step = (progress.phase, percent // _STEP_PERCENT)
        if step not in written:
            written.add(step)
            known = f" {percent} % of {progress.total_bytes / 1e6:.0f} MB" if progress.total_bytes else ""
            stream.write(f"{name}: {progress.phase}{known}\n")
            stream.flush()

    return report
