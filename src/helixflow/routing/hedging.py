"""A second target beside a slow first one: whoever has content first wins, the other is cancelled and paid for."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import msgspec
import structlog

from helixflow.core.call import Call, Progress, SideUsage, Stream
from helixflow.core.errors import HelixError

log = structlog.get_logger("helixflow.routing")

T = TypeVar("T")
_Opening = asyncio.Task[Stream]

# What stands in a call's attempts in place of an error's code.
HEDGED: Final = "hedged"
# Cancelled attempts end within a turn or two of the loop: the winner does not wait for one that does not.
_END_S: Final = 0.25


async def open_hedged(
    call: Call,
    first: T,
    *,
    after_s: float,
    open_one: Callable[[Call, T], Awaitable[Stream]],
    next_target: Callable[[], T | None],
    tries_elsewhere: Callable[[HelixError], bool],
) -> Stream:
    """Opens `call` on `first`, and on one more target as well if there is no content after `after_s`.

    `open_one(call, target)` is a whole attempt: it sets `call.progress.deployment`, ends what it began (turn of health,
    ceiling) when it raises or is cancelled, and when the stream that it returned is closed. The second gets a clone of
    `call` with a `Progress` of its own. `next_target()` is asked once, when the time is over; it gives None where there
    is no other target or the retry budget does not allow it.

    Afterwards `call.progress` is that of the attempt that won: read it again, it may be another object. The loser is in
    its `attempts` as "hedged", and what it may have cost in its `side_usage`. An attempt that failed while the other
    went on is in `attempts` with its error's code, as after a retry; nobody pays for it.

    Raises the `HelixError` of the attempt that failed last, or at once one that `tries_elsewhere` denies; what
    `call.progress` (the same object then) says is of that attempt. Cancelled, it ends both attempts, and `side_usage`
    has what the second may have cost.

    Only streams are hedged: of other answers nobody sees when they begin. And a call for which a loser is paid already
    is not hedged again: two attempts at most are billed.
    """
    if not call.stream or call.progress.side_usage:
        return await open_one(call, first)
    leading = _begin(open_one, call, first)
    try:
        await asyncio.wait((leading,), timeout=after_s)
        if leading.done() or call.progress.first_content_at is not None or (second := next_target()) is None:
            await asyncio.wait((leading,))
            return leading.result()
    except BaseException:
        await _end(leading)
        raise
    # No wait lies between: nothing can be cancelled here.
    rival = msgspec.structs.replace(call, progress=Progress())
    return await _race(call, leading, rival, _begin(open_one, rival, second), tries_elsewhere)


async def _race(
    call: Call, leading: _Opening, rival: Call, chasing: _Opening, tries_elsewhere: Callable[[HelixError], bool]
) -> Stream:
    """The stream of the first that has one; the call's own attempt if both have."""
    running = {leading: call.progress, chasing: rival.progress}
    last = leading
    try:
        while True:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            last = leading if leading in done else chasing
            progress = running.pop(last)
            try:
                stream = last.result()
            except HelixError as exc:
                if not running or not tries_elsewhere(exc):
                    raise
                call.progress.attempts += ((progress.deployment, exc.code),)
                (last,) = running
                continue
            try:
                await _end(*running)
            except BaseException:
                stream.close()
                raise
            for loser, lost in running.items():
                _charge(loser, lost, call.progress)
            if last is chasing:
                progress.attempts = call.progress.attempts
                progress.side_usage = call.progress.side_usage
                call.progress = progress
            return stream
    except HelixError:
        await _end(*running)
        for loser, lost in running.items():
            _charge(loser, lost, call.progress)
        if last is chasing:
            _copy(rival.progress, call.progress)
        raise
    except BaseException:
        await _end(*running)
        if chasing in running or last is chasing:
            _charge(chasing, rival.progress, call.progress)
        raise


def _begin(open_one: Callable[[Call, T], Awaitable[Stream]], call: Call, target: T) -> _Opening:
    async def attempt() -> Stream:
        return await open_one(call, target)

    return asyncio.create_task(attempt())


async def _end(*openings: _Opening) -> None:
    """Cancels them; what they open nevertheless is closed."""
    for opening in openings:
        opening.add_done_callback(_close)
        opening.cancel()
    if openings:
        await asyncio.wait(openings, timeout=_END_S)


def _close(opening: _Opening) -> None:
    if opening.cancelled():
        return
    error = opening.exception()
    if error is None:
        opening.result().close()
    elif not isinstance(error, HelixError):
        log.error("hedge.failed", exc_info=error)


def _charge(loser: _Opening, lost: Progress, to: Progress) -> None:
    """Writes down that the loser was tried, and what it may have cost once its deployment had begun."""
    if not lost.deployment:
        return
    if loser.done() and not loser.cancelled() and isinstance(error := loser.exception(), HelixError):
        to.attempts += ((lost.deployment, error.code),)
        return
    to.attempts += ((lost.deployment, HEDGED),)
    if (began := lost.engine_began_at) is not None:
        engine_ms = int((time.perf_counter() - began) * 1000)
        to.side_usage += (SideUsage(lost.deployment, lost.usage, engine_ms),)


def _copy(failed: Progress, to: Progress) -> None:
    """What was found out in one attempt goes to where the call's progress is looked for."""
    for name in Progress.__struct_fields__:
        if name not in ("attempts", "side_usage"):
            setattr(to, name, getattr(failed, name))
