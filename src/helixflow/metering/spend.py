"""What budgets have spent already, as the ledger knows it: where limiters begin to count."""

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from msgspec import Struct

from helixflow.metering.policies import Budget


class BudgetPeriod(Struct, frozen=True):
    """One budget in one period; bounds in milliseconds since the epoch, (0, 0) for one without end."""

    budget: Budget
    from_ms: int
    to_ms: int

    @property
    def counter(self) -> str:
        """Its name in holds, see `metering.admission`."""
        return f"b:{self.budget.id}:{self.from_ms}"


# In place of a node: an administrator has given the journal up, and any node's shipper closes it as lost.
ABANDONED: Final = "abandoned"


class OpenJournal(Struct, frozen=True):
    """A journal that may still bring requests, and up to where the ledger has it."""

    node_id: str
    position: int


class SpendView(Struct, frozen=True):
    """One consistent view: nanodollars or tokens by period, in the order asked for, and all open journals by id."""

    spent: Sequence[int]
    open_journals: Mapping[str, OpenJournal]


class SpendReader(Protocol):
    """Asks the ledger."""

    async def read(self, periods: Sequence[BudgetPeriod]) -> SpendView:
        """Raises `HelixError` UNAVAILABLE when the ledger does not answer, within 2 s."""
        ...
