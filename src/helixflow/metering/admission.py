"""Leave to dispatch a call: what it asks for, what it got. The contract of every limiter.

Counters are named `l:<limit id>` for limits and `b:<budget id>:<start of the period, ms>` for budgets; a hold is the
amount that a call has taken from one of them: requests (1), tokens, nanodollars. Holds are in the journal, so that who
closes a dead gateway's journal knows what to give back.
"""

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from helixflow.core.call import Meter as Meter
from helixflow.metering.policies import Budget, Limit, Policies


class Demand(Struct, gc=False):
    """What a call asks for.

    `policies` are those that it must fit (see `Policies.for_model`). `tokens` is what it will use as far as can be told
    (for token limits), `tokens_bound` and `cost_bound` what it can use at most (for budgets; nanodollars).
    `deadline` is on the event loop's clock, seconds. `project_id` and `key_id` say which budgets it counts for should
    they be made while it runs; empty for none.
    """

    call_id: str
    organisation_id: str
    policies: Policies
    tokens: int
    tokens_bound: int
    cost_bound: int
    admitted_at_ms: int
    deadline: float
    project_id: str = ""
    key_id: str = ""


class Grant(Struct, gc=False):
    """Leave, and what it took. `requests` and `tokens` are of the tightest limit of that kind, None without one."""

    holds: tuple[tuple[str, int], ...] = ()
    requests: Meter | None = None
    tokens: Meter | None = None


class Refusal(Exception):
    """Why a call may not be dispatched: exactly one of `limit` and `budget`, and the headers' figures.

    `retry_after_s` is None when waiting does not help. `requested` is what the call asks for of it.
    """

    def __init__(
        self,
        *,
        limit: Limit | None = None,
        budget: Budget | None = None,
        retry_after_s: float | None,
        requests: Meter | None = None,
        tokens: Meter | None = None,
        too_large: bool = False,
        requested: int = 0,
    ) -> None:
        super().__init__()
        self.limit = limit
        self.budget = budget
        self.retry_after_s = retry_after_s
        self.requests = requests
        self.tokens = tokens
        # The call alone asks for more than the limit ever gives at once.
        self.too_large = too_large
        self.requested = requested


class Settlement(Struct, gc=False):
    """What an admitted call used: tokens, and what they cost (nanodollars). `position` is that of its record."""

    call_id: str
    organisation_id: str
    holds: tuple[tuple[str, int], ...]
    tokens: int
    cost: int
    position: int


class Limiter(Protocol):
    """Decides, all or nothing: a refused call has taken nothing. One contract suite runs on all limiters.

    Asked and told of all calls, also of those that no policy applies to yet: a budget that is made while they run may
    count them.

    A call that fits is granted when all its limits and budgets have room for it: the tightest wins. Tokens are charged
    to limits as asked for and corrected by the settlement; budgets never give more than their cap.
    """

    def try_admit(self, demand: Demand) -> Grant | None:
        """Decides at once where that can be; None: `admit` must be awaited. Raises `Refusal`."""
        ...

    async def admit(self, demand: Demand) -> Grant:
        """Raises `Refusal`, or `HelixError` UNAVAILABLE while it cannot be known what a budget has left."""
        ...

    def settle(self, settlement: Settlement) -> None:
        """Gives back what was not used. Once a call; never waits, never raises."""
        ...

    def release(self, settlements: Sequence[Settlement]) -> None:
        """As if never asked: for calls that were granted and then not admitted (no room in the journal)."""
        ...

    @property
    def figures(self) -> Struct:
        """For metrics: numbers by name."""
        ...

    async def run(self) -> None:
        """What goes on beside deciding, until cancelled."""
        ...

    async def close(self) -> None:
        """Sends what is on its way. `settle` all before."""
        ...
