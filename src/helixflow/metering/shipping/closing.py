"""What becomes of the holds of a gateway that has ended, where they outlive it."""

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from helixflow.metering.admission import Settlement


class LostCall(Struct, frozen=True, gc=False):
    """A call of which nobody knows how it ended. `cost` is what it had reserved of money budgets, nanodollars."""

    call_id: str
    organisation_id: str
    project_id: str
    key_id: str
    admitted_at_ms: int
    cost: int


class JournalCloser(Protocol):
    """Gives back what the calls of a dead gateway held and did not use. Repeating all of it changes nothing.

    Everything raises `HelixError` while that cannot be done now; it is then called again.
    """

    async def settle(self, journal_id: str, settlements: Sequence[Settlement]) -> list[Settlement]:
        """Calls of the journal that have ended, some at a time, in any order. Returns those to be given to `close`."""
        ...

    async def close(self, journal_id: str, settlements: Sequence[Settlement]) -> None:
        """`settlements` are all that `settle` has returned. What else the journal held was never admitted."""
        ...

    async def list_lost(self, journal_id: str) -> list[LostCall]:
        """The journal is gone: the calls that it is known to hold something for."""
        ...

    async def close_lost(self, journal_id: str) -> None:
        """The journal is gone: what it held is charged in full."""
        ...
