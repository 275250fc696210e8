"""Rates the ledger again: every row by the price that it was rated with, to the nanodollar. Changes nothing."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import Row, Select, case, select

from helixflow.auth.dispatch import Invocation
from helixflow.auth.price_lookup import PriceLookup, Timeline
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.journal.records import SideCharge, Tokens
from helixflow.metering.money import format_dollars
from helixflow.metering.prices import Price
from helixflow.metering.rows import Explanation
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from helixflow.storage.schema import requests

# Rows that one transaction reads, after which there is a message.
PAGE: Final = 5_000
# Differences that are named.
NAMED: Final = 20
# Ids of calls begin with the moment that the call was made, which is before it was admitted: by that much at most,
# also when somebody has set the clock.
_SLACK_MS: Final = 86_400_000
_MAX_TIME: Final = 253_402_300_799  # the end of the year 9999
_ID_DIGITS: Final = 32
_MOMENT_DIGITS: Final = 12
# Charged as reserved, for nobody knows what they used.
_LOST: Final = "lost"
_COLUMNS: Final = tuple(
    requests.c[name]
    for name in (
        "call_id",
        "admitted_at_ms",
        "deployment",
        "outcome",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "engine_ms",
        "cost",
        "price_version",
    )
)
# Few rows have charges of other deployments: for the others the text is not even read.
_SIDE_TEXT: Final = '"side":'
_EXPLANATION: Final = case((requests.c.explanation.contains(_SIDE_TEXT), requests.c.explanation), else_="").label(
    "explanation"
)
_SIDE: Final = msgspec.json.Decoder(Explanation)


class RatingCheck:
    """The operation behind CheckRating. A message for each page of rows with all figures so far, the last one `done`.

    With `current` a row is rated by what the tables of prices say now of its deployment at the moment of its admission;
    where they say nothing any more (nothing was set, and the deployment is not configured), by its own price.
    """

    def __init__(self, lookup: PriceLookup) -> None:
        self._lookup = lookup

    async def __call__(
        self, invocation: Invocation, request: pb.CheckRatingRequest, /
    ) -> AsyncIterator[pb.CheckRatingResponse]:
        """Raises `HelixError` UNPROCESSABLE for a range of time that is none."""
        since, until = getattr(request, "from"), request.to or invocation.now + 1
        if not 0 <= since < until <= _MAX_TIME:
            raise HelixError(ErrorKind.UNPROCESSABLE, "The range of time ends after it has begun.", param="to")
        tally = _Tally()
        prices = _Prices(self._lookup, current=request.current)
        cursor = ""
        while True:
            # A transaction of its own: a slow reader must not hold one open.
            async with invocation.reading() as unit:
                page = (await unit.connection.execute(_page(since, until, cursor))).all()
            await prices.learn(page)
            # In a thread: a page takes tens of milliseconds, and gateways wait for answers.
            await asyncio.to_thread(tally.add, page, prices)
            if len(page) < PAGE:
                yield tally.message(done=True)
                return
            cursor = page[-1].call_id
            yield tally.message(done=False)


class _Prices:
    """The prices that rows are rated by; learnt page by page."""

    def __init__(self, lookup: PriceLookup, *, current: bool) -> None:
        self._lookup = lookup
        self._current = current
        self._versions: dict[str, Price] = {}
        self._timelines: dict[str, Timeline] = {}

    async def learn(self, rows: Sequence[Row[Any]]) -> None:
        """Looks up what is needed for those rows."""
        rated = [_own_charge(row) for row in rows] + [charge for row in rows for charge in _side_charges(row)]
        versions = {charge.price_version for charge in rated} - self._versions.keys() - {""}
        self._versions.update(await self._lookup.versions.find(versions))
        if self._current:
            deployments = {charge.deployment for charge in rated} - self._timelines.keys() - {""}
            timelines = await self._lookup.timelines(map(self._lookup.ref_of, sorted(deployments)))
            self._timelines.update((timeline.ref.deployment, timeline) for timeline in timelines)

    def price_of(self, charge: SideCharge, at_ms: int) -> Price | None:
        """None for a version that is not stored."""
        recorded = self._versions.get(charge.price_version)
        if not self._current:
            return recorded
        timeline = self._timelines[charge.deployment]
        if timeline.ref.deployment not in self._lookup.configured:
            held = timeline.set_at(at_ms)
            return held.price if held is not None else recorded
        return timeline.price_at(at_ms)


class _Tally:
    """What was found so far."""

    def __init__(self) -> None:
        self.rows = self.differing = self.recorded = self.rated = 0
        self.differences: list[pb.RatingDifference] = []

    def add(self, rows: Sequence[Row[Any]], prices: _Prices) -> None:
        for row in rows:
            rated = _rate(row, prices)
            self.rows += 1
            self.recorded += row.cost
            self.rated += rated or 0
            if rated == row.cost:
                continue
            self.differing += 1
            if len(self.differences) < NAMED:
                self.differences.append(
                    pb.RatingDifference(
                        call_id=row.call_id,
                        recorded=format_dollars(row.cost),
                        rated="" if rated is None else format_dollars(rated),
                        price_version=row.price_version,
                    )
                )

    def message(self, *, done: bool) -> pb.CheckRatingResponse:
        return pb.CheckRatingResponse(
            rows=self.rows,
            differing=self.differing,
            recorded=format_dollars(self.recorded),
            rated=format_dollars(self.rated),
            differences=self.differences,
            done=done,
        )


def _rate(row: Row[Any], prices: _Prices) -> int | None:
    """Nanodollars; None when nobody knows the row's price any more, which must not be."""
    if row.outcome == _LOST:
        return int(row.cost)
    cost = 0
    for charge in (_own_charge(row), *_side_charges(row)):
        if not charge.price_version:
            # It came to nothing that is charged.
            continue
        price = prices.price_of(charge, row.admitted_at_ms)
        if price is None:
            return None
        cost += price.rate(charge.tokens, charge.engine_ms)
    return cost


def _own_charge(row: Row[Any]) -> SideCharge:
    """What the deployment that answered charges; its cost is not the row's where others charge as well."""
    tokens = Tokens(row.prompt_tokens, row.cached_tokens, row.completion_tokens)
    return SideCharge(row.deployment, tokens, row.engine_ms, row.cost, row.price_version)


def _side_charges(row: Row[Any]) -> tuple[SideCharge, ...]:
    """What others charge for it."""
    return _SIDE.decode(row.explanation).side if row.explanation else ()


def _page(start: int, end: int, cursor: str) -> "Select[Any]":
    """In the order of ids, which is that of time and has an index that is unique."""
    from_ms, to_ms = start * 1000, end * 1000
    admitted, call_id = requests.c.admitted_at_ms, requests.c.call_id
    query = select(*_COLUMNS, _EXPLANATION).where(
        admitted >= from_ms, admitted < to_ms, call_id > (cursor or _id_at(from_ms - _SLACK_MS))
    )
    return query.where(call_id < _id_at(to_ms + _SLACK_MS)).order_by(call_id).limit(PAGE)


def _id_at(moment_ms: int) -> str:
    """Below all ids of calls that were made then."""
    return f"{max(moment_ms, 0):0{_MOMENT_DIGITS}x}".ljust(_ID_DIGITS, "0")[: _ID_DIGITS - 1]
