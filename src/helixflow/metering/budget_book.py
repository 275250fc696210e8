"""The budgets that one gateway keeps in memory: where each begins to count, and when it may be forgotten.

A budget's period is loaded when it is first needed. What the ledger says is right once nothing can be missing from it:
no other journal of this node is open (a gateway that was killed has left some, and the shipper is closing them), and
ours is in it up to where it ended when the question was first asked. What is settled after that is counted here.
"""

import asyncio
from collections.abc import Callable, Container, Sequence
from itertools import islice
from typing import Final

import structlog
from msgspec import Struct

from helixflow.core.clock import Clock
from helixflow.core.errors import HelixError
from helixflow.metering.admission import Demand
from helixflow.metering.counters import BudgetCounter
from helixflow.metering.policies import DAY_MS, Budget, Scope, period_bounds
from helixflow.metering.spend import BudgetPeriod, SpendReader, SpendView

# The ledger is asked again while its answer is not whole yet; less and less often while there is none.
RETRY_S: Final = 0.05
MAX_RETRY_S: Final = 1.0
# Periods begin at midnight; those in use are loaded so long before.
PRELOAD_MS: Final = 60_000
# Budgets without an end are forgotten once nobody has asked for them for so long: they may have been deleted.
FORGET_MS: Final = DAY_MS
_MAX_QUESTIONS: Final = 500
_SLICE: Final = 1_000
_NONE: Final[Sequence[BudgetCounter]] = ()

log = structlog.get_logger("helixflow.metering")


class _Load(Struct, eq=False):
    """A period that is being asked for. `since` is where our journal ended when that began."""

    counter: BudgetCounter
    since: int
    done: asyncio.Event


class BudgetBook:
    """Counters of budgets, by their periods. `position` is where our journal ends now. `forgotten` is told whenever a
    counter that was found is none any more.
    """

    def __init__(
        self,
        spend: SpendReader,
        clock: Clock,
        *,
        journal_id: str,
        node_id: str,
        position: Callable[[], int],
        forgotten: Callable[[], None],
    ) -> None:
        self._spend = spend
        self._clock = clock
        self._journal_id = journal_id
        self._node_id = node_id
        self._position = position
        self._forgotten = forgotten
        # The counter of each budget that `find` gave last; the others by name, all, and by what they are on.
        self._current: dict[str, BudgetCounter] = {}
        self._counters: dict[str, BudgetCounter] = {}
        self._loads: dict[str, _Load] = {}
        self._of_organisation: dict[str, list[BudgetCounter]] = {}
        self._of_project: dict[str, list[BudgetCounter]] = {}
        self._of_key: dict[str, list[BudgetCounter]] = {}
        self._wanted = asyncio.Event()
        self._failing = False
        # Questions that the ledger did not answer.
        self.failures = 0

    def __len__(self) -> int:
        return len(self._counters)

    @property
    def loading(self) -> int:
        return len(self._loads)

    def find(self, budget: Budget, at_ms: int) -> BudgetCounter | None:
        """The counter of the period that holds this moment, None while it is not known."""
        counter = self._current.get(budget.id)
        if counter is not None and counter.from_ms <= at_ms < counter.to_ms:
            return counter
        counter = self._counters.get(_period(budget, at_ms).counter)
        if counter is None or not counter.is_known:
            return None
        self._current[budget.id] = counter
        return counter

    async def load(self, budgets: Sequence[Budget], at_ms: int) -> None:
        """Returns once all are known. May be cancelled: the loading goes on."""
        for load in [self._begin(budget, at_ms) for budget in budgets]:
            if load is not None:
                await load.done.wait()

    def charge_others(
        self, demand: Demand, position: int, tokens: int, cost: int, held: Container[BudgetCounter]
    ) -> None:
        """Counts a call that has ended against the budgets which apply to it although it holds nothing of them: they
        were made, or became known here, while it ran. `position` is that of its end in our journal."""
        # Once for each request: who has none of a kind, which is most, is asked for nothing.
        applying = self._of_organisation.get(demand.organisation_id, _NONE)
        if self._of_project:
            applying = (*applying, *self._of_project.get(demand.project_id, _NONE))
        if self._of_key:
            for key_id in (demand.key_id, *demand.policies.predecessors):
                applying = (*applying, *self._of_key.get(key_id, _NONE))
        at_ms = demand.admitted_at_ms
        for counter in applying:
            if counter not in held and counter.from_ms <= at_ms < counter.to_ms:
                counter.charge(position, tokens, cost)

    async def run(self) -> None:
        """Asks the ledger for what is wanted, until cancelled."""
        retry_s = RETRY_S
        while True:
            if not self._loads:
                self._wanted.clear()
                await self._wanted.wait()
            batch = list(islice(self._loads.values(), _MAX_QUESTIONS))
            try:
                view = await self._spend.read([load.counter.period for load in batch])
            except HelixError as exc:
                self._note_failure(exc)
                retry_s = min(retry_s * 2, MAX_RETRY_S)
            else:
                self._failing = False
                retry_s = RETRY_S
                self._accept(batch, view)
            if self._loads:
                await asyncio.sleep(retry_s)

    async def tidy(self) -> None:
        """To be called every few seconds: forgets what is over or nobody asks for, and loads what begins soon."""
        now_ms = int(self._clock.now() * 1000)
        soon_ms = now_ms + PRELOAD_MS
        if soon_ms // DAY_MS != now_ms // DAY_MS:
            for number, counter in enumerate(list(self._current.values())):
                if now_ms < counter.to_ms <= soon_ms:
                    self._begin(counter.period.budget, soon_ms)
                if number % _SLICE == _SLICE - 1:
                    await asyncio.sleep(0)
        for number, counter in enumerate(list(self._counters.values())):
            if (counter.to_ms <= now_ms or self._is_unasked(counter, now_ms)) and not counter.reserved:
                self._forget(counter)
            if number % _SLICE == _SLICE - 1:
                await asyncio.sleep(0)

    def _is_unasked(self, counter: BudgetCounter, now_ms: int) -> bool:
        """Whether nobody has asked for a budget without an end for a day. Who asks does so by `find` first: after each
        look here it is not in `_current`.
        """
        if counter.period.to_ms:
            return False
        if self._current.pop(counter.period.budget.id, None) is not None or counter.name in self._loads:
            counter.asked_ms = now_ms
        return now_ms - counter.asked_ms >= FORGET_MS

    def _begin(self, budget: Budget, at_ms: int) -> _Load | None:
        """The loading of the period that holds this moment, None if it is known."""
        period = _period(budget, at_ms)
        name = period.counter
        counter = self._counters.get(name)
        if counter is None:
            counter = self._counters[name] = BudgetCounter(period)
            counter.asked_ms = int(self._clock.now() * 1000)
            self._of(budget.scope).setdefault(budget.subject_id, []).append(counter)
            self._loads[name] = _Load(counter, self._position(), asyncio.Event())
            self._wanted.set()
        return self._loads.get(name)

    def _note_failure(self, error: HelixError) -> None:
        self.failures += 1
        if not self._failing:
            self._failing = True
            log.warning("budgets.unknown", reason=error.code, detail=error.message, budgets=len(self._loads))

    def _accept(self, batch: Sequence[_Load], view: SpendView) -> None:
        """Takes from an answer what is whole."""
        ours = view.open_journals.get(self._journal_id)
        whole = ours is not None and not any(
            journal.node_id == self._node_id and journal_id != self._journal_id
            for journal_id, journal in view.open_journals.items()
        )
        for load, spent in zip(batch, view.spent, strict=True):
            name = load.counter.name
            if self._loads.get(name) is not load:
                # Forgotten meanwhile.
                continue
            del self._loads[name]
            if whole and ours is not None and ours.position >= load.since:
                load.counter.know(spent, ours.position)
                load.done.set()
            else:
                # Last in the queue, for others to have their turn.
                self._loads[name] = load

    def _forget(self, counter: BudgetCounter) -> None:
        budget = counter.period.budget
        del self._counters[counter.name]
        self._loads.pop(counter.name, None)
        if self._current.get(budget.id) is counter:
            del self._current[budget.id]
        siblings = self._of(budget.scope)[budget.subject_id]
        siblings.remove(counter)
        self._forgotten()
        if not siblings:
            del self._of(budget.scope)[budget.subject_id]

    def _of(self, scope: Scope) -> dict[str, list[BudgetCounter]]:
        """By their subjects, the counters of budgets that are on such."""
        match scope:
            case Scope.ORGANISATION:
                return self._of_organisation
            case Scope.PROJECT:
                return self._of_project
            case Scope.KEY:
                return self._of_key
        raise ValueError(f"budgets are on organisations, projects and keys, not on {scope.name}")


def _period(budget: Budget, at_ms: int) -> BudgetPeriod:
    return BudgetPeriod(budget, *period_bounds(budget.period, at_ms // DAY_MS))
