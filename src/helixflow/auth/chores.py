"""What must be done now and then, whoever wrote it: pruning, checkpoints, retiring keys."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from helixflow.core.clock import Clock
from helixflow.core.errors import HelixError

_LOOK_EVERY_S: Final = 5.0

log = structlog.get_logger("helixflow.auth")


@dataclass(frozen=True, slots=True)
class Chore:
    """`do` gets the time in seconds since the epoch. It is done again `every_s` seconds after it was begun."""

    name: str
    every_s: float
    do: Callable[[int], Awaitable[object]]


class Chores:
    """Does them one after the other, each for the first time soon after the start.

    One that fails (the database is away) is logged, once until it works again, and comes again at its next turn.
    """

    def __init__(self, chores: Sequence[Chore], clock: Clock) -> None:
        self._clock = clock
        self._due_at = dict.fromkeys(chores, clock.monotonic())
        self._failing: set[Chore] = set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            await self.do_due()

    async def do_due(self) -> None:
        """Does all that is due now."""
        for chore, due_at in list(self._due_at.items()):
            if self._clock.monotonic() < due_at:
                continue
            self._due_at[chore] = self._clock.monotonic() + chore.every_s
            try:
                await chore.do(int(self._clock.now()))
            except HelixError as exc:
                if chore not in self._failing:
                    self._failing.add(chore)
                    log.warning("chore.failed", chore=chore.name, code=exc.code, reason=exc.message)
            else:
                self._failing.discard(chore)
