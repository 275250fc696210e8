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
    `keep_settlements`, `take_settlements` gives those of all calls that ended, shipped or not.

    A call that is not settled `expiry_ms` after its admission, by the moments of later records, has ended without a
    settlement that can be read: it was interrupted. Its row lies within the first record that shows it, before its end
    by as many bytes as calls admitted later expire with it. So it has the same position wherever the reading began.
    """

    def __init__(
        self, journal_id: str, *, shipped: int = 0, keep_settlements: bool = False, expiry_ms: int | None = None
    ) -> None:
        self._journal_id = journal_id
        self._shipped = shipped
        self._keep_settlements = keep_settlements
        self._open: dict[str, _Open] = {}
        self._orphans: list[str] = []
        self._expiry_ms = expiry_ms
        # Calls that have expired: should they be settled after all, they have their rows.
        self._expired: set[str] = set()
        self._settlements: list[Settlement] = []
        self.position = 0
        self.expired = 0

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
                    elif record.call_id in self._expired:
                        self._expired.remove(record.call_id)
                    else:
                        if self._keep_settlements:
                            # Its admission lay in what was cut, or cannot be read.
                            self._settlements.append(
                                Settlement(record.call_id, "", (), record.tokens.total, record.cost, end)
                            )
                        if end > self._shipped:
                            self._orphans.append(record.call_id)
                case Progressed():
                    if (call := self._open.get(record.call_id)) is not None:
                        call.progressed = record
                    rows += self._expire(record.at_ms, start, end)
                case Admitted():
                    self._open.setdefault(record.call_id, _Open(start, record))
                    rows += self._expire(record.admitted_at_ms, start, end)
        return rows

    def finish(self) -> list[Positioned]:
        """The journal has ended: rows of the calls that were interrupted, with what they had used so far."""
        rows: list[Positioned] = []
        for call in self._open.values():
            rows += self._interrupt(call, INTERRUPTED_BASE + call.start)
        self._open.clear()
        return rows

    def take_settlements(self) -> list[Settlement]:
        """Those that were found since the last time."""
        settlements, self._settlements = self._settlements, []
        return settlements

    def take_orphans(self) -> list[str]:
        """Calls whose settlement came without an admission since the last time: what was admitted cannot be read."""
        orphans, self._orphans = self._orphans, []
        return orphans

    def _expire(self, now_ms: int, start: int, end: int) -> list[Positioned]:
        if self._expiry_ms is None or not self._open:
            return []
        expired: list[_Open] = []
        for call in self._open.values():
            if call.admitted.admitted_at_ms + self._expiry_ms > now_ms:
                break
            expired.append(call)
        # Each takes a byte of the record; should there be too few, the oldest wait for the next record.
        expired = expired[1 - (end - start) :]
        rows: list[Positioned] = []
        for position, call in enumerate(expired, end + 1 - len(expired)):
            del self._open[call.admitted.call_id]
            self._expired.add(call.admitted.call_id)
            self.expired += 1
            rows += self._interrupt(call, position)
        return rows

    def _interrupt(self, call: _Open, position: int) -> list[Positioned]:
        progressed = call.progressed
        tokens, cost = (_NO_TOKENS, 0) if progressed is None else (progressed.tokens, progressed.cost)
        self._settle(call.admitted, tokens, cost, position)
        return [(position, self._interrupted_row(call.admitted, progressed))] if position > self._shipped else []

    def _settle(self, admitted: Admitted, tokens: Tokens, cost: int, position: int) -> None:
        if self._keep_settlements and admitted.holds:
            self._settlements.append(
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
            side=settled.side,
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
            side=progressed.side,
        )
