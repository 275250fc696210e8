"""A single-threaded event loop of callbacks: readable or writable descriptors, timers and signals. No asyncio."""

import contextlib
import heapq
import itertools
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

Callback = Callable[[], None]
READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE


@dataclass(order=True, slots=True)
class Timer:
    """A callback that is due at `due` on the monotonic clock."""

    due: float
    order: int
    callback: Callback = field(compare=False)
    cancelled: bool = field(default=False, compare=False)

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """Owns a selector; `run` returns after `stop`. Not thread-safe, and needs the main thread for signals."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[Timer] = []
        self._order = itertools.count()
        self._running = False
        self._wakeup: tuple[int, int] | None = None
        self._on_signal: dict[int, Callback] = {}

    def now(self) -> float:
        return time.monotonic()

    def watch(self, fd: int, on_read: Callback | None = None, on_write: Callback | None = None) -> None:
        """Sets what is called when `fd` is ready; replaces what was set before. Both None forgets the descriptor."""
        events = (READ if on_read else 0) | (WRITE if on_write else 0)
        known = fd in self._selector.get_map()
        if not events:
            if known:
                self._selector.unregister(fd)
        elif known:
            self._selector.modify(fd, events, (on_read, on_write))
        else:
            self._selector.register(fd, events, (on_read, on_write))

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        timer = Timer(self.now() + delay_s, next(self._order), callback)
        heapq.heappush(self._timers, timer)
        return timer

    def on_signals(self, numbers: Iterable[int], callback: Callable[[int], None]) -> None:
        """Calls `callback` from the loop, never from within another callback, when one of the signals arrives."""
        if self._wakeup is None:
            self._wakeup = os.pipe()
            for fd in self._wakeup:
                os.set_blocking(fd, False)
            signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
            self.watch(self._wakeup[0], self._take_signals)
        for number in numbers:
            self._on_signal[number] = lambda number=number: callback(number)  # type: ignore[misc]
            signal.signal(number, lambda _number, _frame: None)

    def run(self) -> None:
        self._running = True
        while self._running:
            for key, events in self._selector.select(self._timeout_s()):
                # An earlier callback of this round may have closed the descriptor or changed who watches it.
                if self._is_current(key):
                    on_read, on_write = key.data
                    if events & READ and on_read:
                        on_read()
                    if events & WRITE and on_write and self._is_current(key):
                        on_write()
            self._run_timers()

    def stop(self) -> None:
        self._running = False

    def close(self) -> None:
        """Gives back the signals and the selector; watched descriptors stay open."""
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            for fd in self._wakeup:
                os.close(fd)
            self._wakeup = None
        self._selector.close()

    def _is_current(self, key: selectors.SelectorKey) -> bool:
        return self._selector.get_map().get(key.fd) == key

    def _timeout_s(self) -> float | None:
        while self._timers and self._timers[0].cancelled:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0].due - self.now()) if self._timers else None

    def _run_timers(self) -> None:
        now = self.now()
        while self._timers and self._timers[0].due <= now:
            timer = heapq.heappop(self._timers)
            if not timer.cancelled:
                timer.callback()

    def _take_signals(self) -> None:
        assert self._wakeup is not None
        with contextlib.suppress(BlockingIOError):
            # A full pipe loses repeats of a signal, never its first: one read of what is there serves all.
            for number in dict.fromkeys(os.read(self._wakeup[0], 4096)):
                if number in self._on_signal:
                    self._on_signal[number]()
