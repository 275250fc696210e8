"""From records to rows: joins what one journal says about each call. No I/O."""

from collections.abc import Iterable
from typing import Final

from msgspec import Struct

from helixflow.metering.admission import Settlement
from helixflow.metering.journal.records import Admitted, Progressed, Record, Settled, Tokens
from helixflow.metering.rows import Positioned, RequestRow, make_row

# Where the rows of interrupted calls lie: past every record that a journal can have, each at its admission's position,
# so that they have the same positions whenever they are made, however much of the end is torn then. Less than 2^53, for
# Redis' scripts.
INTERRUPTED_BASE: Final = 1 << 52
INTERRUPTED: Final = "interrupted"
_NO_TOKENS: Final = Tokens()

Entry = tuple[int, int, Record]


class _Open(Struct, gc=False):
    """A call that is admitted and not settled."""

    start: int
    admitted: Admitted
    progressed: Progressed | None = None


class Joiner:
    """Takes the entries (start, end, record) of one journal in their order, from any cut, and gives rows.

    Rows at or before `shipped` are left out: the ledger has them. `position` is the end of the last record. With
    `keep_settlements`, `settlements` are those of all calls that ended and held something, shipped or not.
    """

    def __init__(self, journal_id: str, *, shipped: int = 0, keep_settlements: bool = False) -> None:
        self._journal_id = journal_id
        self._shipped = shipped
        self._keep_settlements = keep_settlements
        self._open: dict[str, _Open] = {}
        self._orphans: list[str] = []
        self.position = 0
        self.settlements: list[Settlement] = []

    @property
    def unsettled(self) -> int:
        return len(self._open)

    @property
    def oldest_needed(self) -> int:
        """Nothing before this position is needed to go on: the first unsettled admission begins there."""
        return next(iter(self._open.values())).start if self._open else self.position

    def feed(self, entries: Iterable[Entry]) -> list[Positioned]:
        """The rows of the calls that end in `entries`, each at the end of its settlement."""
        rows: list[Positioned] = []
        for start, end, record in entries:
            self.position = end
            match record:
                case Settled():
                    call = self._open.pop(record.call_id, None)
                    if call is not None:
                        self._settle(call.admitted, record.tokens, record.cost, end)
                        if end > self._shipped:
                            rows.append((end, self._settled_row(call.admitted, record)))
                    elif end > self._shipped:
                        self._orphans.append(record.call_id)
                case Progressed():
                    if (call := self._open.get(record.call_id)) is not None:
                        call.progressed = record
                case Admitted():
                    self._open.setdefault(record.call_id, _Open(start, record))
        return rows

    def finish(self) -> list[Positioned]:
        """The journal has ended: rows of the calls that were interrupted, with what they had used so far."""
        rows: list[Positioned] = []
        for call in self._open.values():
            position = INTERRUPTED_BASE + call.start
            progressed = call.progressed
            tokens, cost = (_NO_TOKENS, 0) if progressed is None else (progressed.tokens, progressed.cost)
            self._settle(call.admitted, tokens, cost, position)
            if position > self._shipped:
                rows.append((position, self._interrupted_row(call.admitted, progressed)))
        self._open.clear()
        return rows

    def take_orphans(self) -> list[str]:
        """Calls whose settlement came without an admission since the last time: what was admitted cannot be read."""
        orphans, self._orphans = self._orphans, []
        return orphans

    def _settle(self, admitted: Admitted, tokens: Tokens, cost: int, position: int) -> None:
        if self._keep_settlements and admitted.holds:
            self.settlements.append(
                Settlement(admitted.call_id, admitted.organisation_id, admitted.holds, tokens.total, cost, position)
            )

    def _settled_row(self, admitted: Admitted, settled: Settled) -> RequestRow:
        return make_row(
            admitted,
            settled.tokens,
            journal_id=self._journal_id,
            deployment=settled.deployment,
            status=settled.status,
            outcome=settled.outcome,
            error=settled.error,
            cost=settled.cost,
            price_version=settled.price_version,
            queue_ms=settled.queue_ms,
            first_token_ms=settled.first_token_ms,
            duration_ms=settled.duration_ms,
            engine_ms=settled.engine_ms,
            attempts=settled.attempts,
        )

    def _interrupted_row(self, admitted: Admitted, progressed: Progressed | None) -> RequestRow:
        """No answer has ended: the status is 0, and the duration lasts to what was heard last."""
        if progressed is None:
            return make_row(
                admitted,
                _NO_TOKENS,
                journal_id=self._journal_id,
                deployment="",
                status=0,
                outcome=INTERRUPTED,
                error=INTERRUPTED,
            )
        return make_row(
            admitted,
            progressed.tokens,
            journal_id=self._journal_id,
            deployment=progressed.deployment,
            status=0,
            outcome=INTERRUPTED,
            error=INTERRUPTED,
            cost=progressed.cost,
            price_version=progressed.price_version,
            first_token_ms=progressed.first_token_ms,
            # The clock may have been set back meanwhile.
            duration_ms=max(0, progressed.at_ms - admitted.admitted_at_ms),
            engine_ms=progressed.engine_ms,
        )
