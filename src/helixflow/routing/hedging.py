"""A second target beside a slow first one: whoever has content first wins, the other is cancelled and paid for."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from helixflow.core.call import Call, Stream
from helixflow.core.errors import HelixError

T = TypeVar("T")


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
    ceiling) when it raises or is cancelled, and when the stream that it returns is closed. It may be given a clone of
    `call` with a `Progress` of its own. `next_target()` is asked once, when the time is over; it gives None where there
    is no other target or the retry budget does not allow it.

    Afterwards `call.progress` is that of the attempt that won, or failed last (read it again: it may be another
    object). What the loser may have cost is in its `side_usage`, and the loser in `attempts` as "hedged"; an attempt
    that failed before the other ended is there with its error's code. Raises `HelixError` of the attempt that failed
    last; at once what `tries_elsewhere` denies. When cancelled both attempts have ended, with what the second may have
    cost in `side_usage`.

    Only streams are hedged: of other answers nobody sees when they begin.
    """
    raise NotImplementedError
