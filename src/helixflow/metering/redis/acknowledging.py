"""How much of our journal Redis needs no more, told to whoever cuts the journal.

A gateway that dies while Redis is out of its reach leaves ends of calls that only its journal knows: of those that
Redis has reserved, and of those that were made on leases. Whoever closes the journal tells Redis of them, so they must
be there still.
"""

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from helixflow.metering.redis.calls import Outbox
from helixflow.metering.redis.membership import Membership
from helixflow.metering.redis.restoring import Restoration

INTERVAL_S: Final = 0.2

log = structlog.get_logger("helixflow.metering")


class Acknowledgement:
    """`tell` is given a position when it has grown, and may raise `OSError`: it is then told again.

    `position` is where our journal ends: what has been settled before was given to the outbox in the same turn.
    """

    def __init__(
        self,
        membership: Membership,
        restoration: Restoration,
        outbox: Outbox,
        position: Callable[[], int],
        tell: Callable[[int], None],
    ) -> None:
        self._membership = membership
        self._restoration = restoration
        self._outbox = outbox
        self._position = position
        self._tell = tell
        self._told = 0
        self._is_failing = False

    @property
    def is_whole(self) -> bool:
        """Redis knows of all calls, and of all ends that are not in the outbox.

        While it is away calls are made on leases, of which it hears when we have joined again: until it has said so,
        nothing that came since is acknowledged.
        """
        return self._membership.session is not None and not self._restoration.in_doubt

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.step()
            await asyncio.sleep(INTERVAL_S)

    def step(self) -> None:
        """Tells what can be told now."""
        if not self.is_whole:
            return
        first = min((ended.position for ended in self._outbox.unacknowledged() if ended.tokens >= 0), default=None)
        # A settlement's position is that of its end: one byte before lies within it.
        position = self._position() if first is None else first - 1
        if position <= self._told:
            return
        try:
            self._tell(position)
        except OSError as exc:
            if not self._is_failing:
                self._is_failing = True
                log.warning("acknowledged.untold", reason=exc.strerror, advice="the journal is not cut meanwhile")
        else:
            self._told, self._is_failing = position, False
