"""One try of one deployment, and what the deployment is told of how it went."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from helixflow.core.call import Call, Stream
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.routing.ceilings import expected_tokens
from helixflow.routing.target import Target

_FAULTS: Final = frozenset({ErrorKind.UPSTREAM_UNAVAILABLE, ErrorKind.UPSTREAM_INVALID, ErrorKind.NOT_SERVED})
# Of a provider that refuses a call as one too many and does not say for how long.
_PAUSE_S: Final = 1.0


def is_slow(kind: ErrorKind, call: Call) -> bool:
    """Whether it was the deployment that did not answer in time, and not the call whose own time is over."""
    return kind is ErrorKind.DEADLINE and asyncio.get_running_loop().time() < call.deadline


async def open_on(target: Target, call: Call, monotonic: Callable[[], float]) -> Stream:
    """The call's answer from this target. Ends what it takes of the target when it fails or is cancelled, and when the
    stream that it returns is closed. `monotonic` is the clock of the target's latency.
    """
    turn = _Turn(target, call)
    began = monotonic()
    try:
        stream = await target.engine.open(call)
    except HelixError as exc:
        turn.fail(exc)
        raise
    except BaseException:
        turn.abandon()
        raise
    now = monotonic()
    elapsed_s = now - began
    if call.stream:
        target.health.succeed(turn.number, elapsed_s)
        target.latency.measure(elapsed_s, now)
        return _RoutedStream(stream, turn)
    target.health.succeed(turn.number, elapsed_s, whole=True)
    turn.leave()
    if (first := call.progress.first_content_at) is None:
        target.whole_latency.measure(elapsed_s, now)
    else:
        target.latency.measure(max(0.0, elapsed_s - (time.perf_counter() - first)), now)
    return stream


class _Turn:
    """What a call takes of a target: a place in its ceilings, a turn of its health."""

    __slots__ = ("_call", "_entry", "_progress", "_target", "_tokens", "number")

    def __init__(self, target: Target, call: Call) -> None:
        self._target = target
        self._call = call
        self._progress = progress = call.progress
        progress.deployment = target.deployment
        progress.engine_began_at = None
        ceiling = target.ceiling
        self._entry = -1
        if ceiling.is_active:
            self._tokens = expected_tokens(call) if ceiling.counts_tokens else 0
            self._entry = ceiling.enter(self._tokens)
        target.in_flight += 1
        self.number = target.health.begin()

    def fail(self, error: HelixError) -> None:
        """Before the first content."""
        target, kind = self._target, error.kind
        # The replicas of our own pools say themselves when they can be used: nobody else waits for this call's reasons.
        retry_after_s = error.retry_after_s if target.slots is None else None
        if kind in _FAULTS or is_slow(kind, self._call):
            target.health.fail(self.number, retry_after_s=retry_after_s)
        elif kind is ErrorKind.OVERLOADED:
            target.health.abandon(self.number, retry_after_s=retry_after_s)
        else:
            target.health.abandon(self.number)
            if kind is ErrorKind.RATE_LIMITED and target.slots is None:
                target.ceiling.refuse(retry_after_s or _PAUSE_S)
        self.leave()

    def abandon(self) -> None:
        """Nobody knows how it would have gone."""
        self._target.health.abandon(self.number)
        self.leave()

    def end(self) -> None:
        """After a stream's first content, however it ended: well, broken off, or because nobody wanted it any more."""
        progress = self._progress
        if progress.complete:
            self._target.health.finish()
        elif (kind := progress.failure) is not None and (kind in _FAULTS or is_slow(kind, self._call)):
            self._target.health.break_off(self.number)
        self.leave()

    def leave(self) -> None:
        """When nothing more is to be said of the target's health."""
        target = self._target
        target.in_flight -= 1
        if self._entry >= 0:
            usage = self._progress.usage
            used = usage.prompt_tokens + usage.completion_tokens if usage.reported else None
            target.ceiling.leave(self._entry, self._tokens, used)


class _RoutedStream:
    """A stream as its engine made it: nothing lies between it and who reads it. Only its end is noticed."""

    __slots__ = ("_stream", "_turn", "read")

    def __init__(self, stream: Stream, turn: _Turn) -> None:
        self._stream = stream
        self._turn: _Turn | None = turn
        self.read: Callable[[], Coroutine[Any, Any, bytes]] = stream.read

    def close(self) -> None:
        self._stream.close()
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.end()
