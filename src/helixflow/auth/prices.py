"""What models and deployments cost: prices that operators set, and what holds where none is set."""

import re
from collections.abc import Iterable
from typing import Any, Final

from sqlalchemy import Select, and_, or_

from helixflow.auth.dispatch import Conversation, Flow, Invocation, Operation
from helixflow.auth.paging import DEFAULT_SIZE, MAX_SIZE, read_page
from helixflow.auth.price_lookup import DEPLOYMENT, SET_PRICES, PriceLookup, SetPrice, Timeline
from helixflow.auth.price_rates import SET, show_rates
from helixflow.auth.price_setting import MAX_TIME, end_price, price_entry, set_price
from helixflow.auth.rating import RatingCheck
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.prices import Price, decode_price
from helixflow.rpc.generated.auth_v1 import metering_pb2
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from helixflow.storage.schema import prices

# A list begins with what nobody has set; cursors within that part are counts, those of `paging` never begin so.
_UNSET_CURSOR: Final = re.compile(r"unset-([0-9]{1,6})")


def price_operations(lookup: PriceLookup) -> dict[str, Operation | Conversation | Flow]:
    """The operations of UsageService on prices, by the names of their RPCs."""
    return {
        "ListPrices": ListPrices(lookup),
        "GetPrice": GetPrice(lookup),
        "SetPrice": Operation(set_price),
        "EndPrice": Operation(end_price),
        "CheckRating": RatingCheck(lookup),
    }


class ListPrices:
    """First what holds now for configured deployments without a price of anybody's, then all that were ever set, the
    latest beginning first.
    """

    def __init__(self, lookup: PriceLookup) -> None:
        self._lookup = lookup

    async def __call__(self, invocation: Invocation, request: pb.ListPricesRequest, /) -> pb.ListPricesResponse:
        if not 0 <= request.page_size <= MAX_SIZE:
            raise HelixError(ErrorKind.UNPROCESSABLE, f"A page has 1 to {MAX_SIZE} entries.", param="limit")
        size = request.page_size or DEFAULT_SIZE
        found: list[pb.PriceEntry] = []
        cursor = request.cursor
        within = _UNSET_CURSOR.fullmatch(cursor)
        if not cursor or within:
            start = int(within[1]) if within else 0
            unset = await self._unset(invocation, request.subject)
            found, cursor = unset[start : start + size], ""
            if len(found) == size:
                return pb.ListPricesResponse(prices=found, next_cursor=f"unset-{start + size}")
        query = SET_PRICES.where(prices.c.subject == request.subject) if request.subject else SET_PRICES
        async with invocation.reading() as unit:
            rows, next_cursor = await read_page(
                unit.connection,
                query,
                (prices.c.valid_from, prices.c.id),
                page_size=size - len(found),
                cursor=cursor,
            )
        return pb.ListPricesResponse(
            prices=[*found, *(price_entry(SetPrice.of(row)) for row in rows)], next_cursor=next_cursor
        )

    async def _unset(self, invocation: Invocation, subject: str) -> list[pb.PriceEntry]:
        refs = [ref for ref in self._lookup.configured.values() if subject in ("", ref.model, ref.deployment)]
        entries = await _entries_at(self._lookup, refs, invocation.now, invocation.now)
        return [entry for entry in entries if entry.source != SET]


class GetPrice:
    """The price of a deployment, of a model (where none is set for it: of its first deployment), or of a version."""

    def __init__(self, lookup: PriceLookup) -> None:
        self._lookup = lookup

    async def __call__(self, invocation: Invocation, request: pb.GetPriceRequest, /) -> pb.PriceEntry:
        """Raises `HelixError` NOT_FOUND for what has no price and is none."""
        subject, now = request.subject, invocation.now
        at = request.at or now
        if not 0 < at <= MAX_TIME:
            raise HelixError(ErrorKind.UNPROCESSABLE, "This is no moment that a price can be for.", param="at")
        if (ref := self._lookup.configured.get(subject)) is not None:
            (entry,) = await _entries_at(self._lookup, [ref], at, now)
            return entry
        async with invocation.reading() as unit:
            rows = (await unit.connection.execute(_valid_at(subject, at))).all()
        if rows:
            # Of a model, or of a deployment that is not configured here.
            return price_entry(SetPrice.of(rows[0]))
        first = next((ref for ref in self._lookup.configured.values() if ref.model == subject), None)
        if first is not None:
            (entry,) = await _entries_at(self._lookup, [first], at, now)
            return entry
        if (row := (await self._lookup.versions.rows([subject])).get(subject)) is not None:
            price = decode_price(row.body)
            return pb.PriceEntry(
                version=row.version, rates=show_rates(price), source=price.source, created_at=row.created_at
            )
        message = "No model, deployment or version of a price has this name, or it has no price then."
        raise HelixError(ErrorKind.NOT_FOUND, message, param="subject")


def _valid_at(subject: str, at: int) -> "Select[Any]":
    holds = and_(prices.c.valid_from <= at, or_(prices.c.valid_to.is_(None), prices.c.valid_to > at))
    return SET_PRICES.where(prices.c.subject == subject, holds)


async def _entries_at(
    lookup: PriceLookup, refs: Iterable[metering_pb2.DeploymentRef], at: int, now: int
) -> list[pb.PriceEntry]:
    """What those deployments charge at `at`, in order."""
    timelines = await lookup.timelines(refs, since_s=at)
    entries = [_entry_at(timeline, at) for timeline in timelines]
    await lookup.versions.keep([price for price, _ in entries], now)
    return [entry for _, entry in entries]


def _entry_at(timeline: Timeline, at: int) -> tuple[Price, pb.PriceEntry]:
    if (found := timeline.set_at(at * 1000)) is not None:
        return found.price, price_entry(found)
    first = timeline.periods(at * 1000)[0]
    return first.price, pb.PriceEntry(
        version=first.price.version,
        subject_kind=DEPLOYMENT,
        subject=timeline.ref.deployment,
        rates=show_rates(first.price),
        valid_to=(first.to_ms or 0) // 1000,
        source=first.price.source,
    )
