"""What becomes of the holds of a gateway that has ended, where they outlive it."""

from collections.abc import Sequence
from typing import Protocol

from helixflow.metering.admission import Settlement


class JournalCloser(Protocol):
    """Gives back what the calls of a dead gateway held and did not use. Repeating a call changes nothing.

    Both raise `HelixError` while that cannot be done now; they are called again.
    """

    async def close(self, journal_id: str, settlements: Sequence[Settlement]) -> None:
        """`settlements` are of all calls in what is left of the journal: what else it held was never admitted."""
        ...

    async def close_lost(self, journal_id: str) -> None:
        """The journal is gone: what it held is charged in full."""
        ...
