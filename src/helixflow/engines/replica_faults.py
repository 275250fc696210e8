"""Replicas that fail before a client has seen anything: the call begins again on another one."""

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from helixflow.core.capacity import Slots
from helixflow.core.errors import ErrorKind, HelixError

# A request that kills whatever serves it must not go round all replicas for ever.
MOST_STARTS: Final = 8

T = TypeVar("T")


def is_replica_fault(exc: BaseException) -> bool:
    """Whether a failure says something about the replica, rather than about the request or its client."""
    return isinstance(exc, HelixError) and exc.kind in (ErrorKind.UPSTREAM_UNAVAILABLE, ErrorKind.UPSTREAM_INVALID)


async def start_on_some(start: Callable[[], Awaitable[T]], slots: Slots) -> T:
    """What `start` gives, which takes a lease of `slots` itself: called again where its replica fails and there is
    another one, `MOST_STARTS` times at most.
    """
    for _ in range(MOST_STARTS - 1):
        try:
            return await start()
        except HelixError as exc:
            if not is_replica_fault(exc) or not slots.has_alternative():
                raise
    return await start()
