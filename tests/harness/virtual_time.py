"""An event loop in which waiting takes no time: `time()` jumps to whatever comes next."""

import asyncio
import selectors


class _JumpingSelector(selectors.SelectSelector):
    """Waits for nothing: what would have been waited is added up in `waited_s`."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing will ever happen: all tasks wait for each other")
        self.waited_s += max(timeout, 0.0)
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """For tests without sockets and threads."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.waited_s
