"""The tasks that a process cannot do without: none of them ends before the process does."""

import asyncio
from collections.abc import Collection

from helixflow.core.errors import ErrorKind, HelixError, UserError


async def until_stopped(stopping: asyncio.Event, tasks: Collection[asyncio.Task[None]]) -> None:
    """Returns once `stopping` is set. When one of `tasks` ends before that, there is nothing left to go on with.

    Raises what the task raised if that is a `UserError` or `HelixError` (of a group: its first one), else `HelixError`
    (INTERNAL) that names the task, because of what it raised, if anything. The tasks that still run are the caller's to
    cancel.
    """
    stopped = asyncio.create_task(stopping.wait())
    try:
        done, _ = await asyncio.wait({stopped, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
    if stopping.is_set():
        return
    failures = [(task.get_name(), None if task.cancelled() else task.exception()) for task in done]
    # Of several that end at once, one that says why.
    name, cause = next((failure for failure in failures if failure[1] is not None), failures[0])
    known = _known_of(cause)
    if known is not None:
        raise known
    raise HelixError(ErrorKind.INTERNAL, f"The task '{name}', which must not end, has ended.") from cause


def _known_of(cause: BaseException | None) -> UserError | HelixError | None:
    """The first of what says for itself what is wrong; a task that has tasks of its own raises groups."""
    if isinstance(cause, UserError | HelixError):
        return cause
    parts = cause.exceptions if isinstance(cause, BaseExceptionGroup) else ()
    return next((known for part in parts if (known := _known_of(part)) is not None), None)


async def until_lost(launcher: asyncio.Event) -> None:
    """A task for `until_stopped`: raises `HelixError` (UNAVAILABLE) once the launcher is lost, and with it engines."""
    await launcher.wait()
    raise HelixError(ErrorKind.UNAVAILABLE, "The launcher's socket is gone.")
