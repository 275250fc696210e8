"""Prices that operators set, and what holds where none is set. A price once in force is never changed or taken away."""

import re
import secrets
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Row, Select, insert, select, update

from helixflow.auth.dispatch import Conversation, Flow, Invocation, Operation
from helixflow.auth.paging import DEFAULT_SIZE, MAX_SIZE, read_page
from helixflow.auth.price_lookup import DEPLOYMENT, MODEL, PriceLookup
from helixflow.auth.price_rates import SET, parse_rates, show_rates
from helixflow.auth.price_versions import keep_version
from helixflow.auth.rating import RatingCheck
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.prices import Price, decode_price
from helixflow.rpc.generated.auth_v1 import metering_pb2
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_PRICES
from helixflow.storage.schema import price_versions, prices

_TARGET: Final = "price"
_MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}")
_DEPLOYMENT_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}/[a-z0-9_]{1,50}-[0-9]{1,5}")
_MAX_TIME: Final = 253_402_300_799  # the end of the year 9999
# A list begins with what nobody has set; cursors within that part are counts, those of `paging` never begin so.
_UNSET_CURSOR: Final = re.compile(r"unset-([0-9]{1,6})")
_WITH_BODY: Final = select(prices, price_versions.c.body).join(
    price_versions, price_versions.c.version == prices.c.price_version
)


def price_operations(lookup: PriceLookup) -> dict[str, Operation | Conversation | Flow]:
    """The operations of UsageService on prices, by the names of their RPCs."""
    return {
        "ListPrices": ListPrices(lookup),
        "GetPrice": GetPrice(lookup),
        "SetPrice": Operation(set_price),
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
        query = _WITH_BODY.where(prices.c.subject == request.subject) if request.subject else _WITH_BODY
        async with invocation.reading() as unit:
            rows, next_cursor = await read_page(
                unit.connection,
                query,
                (prices.c.valid_from, prices.c.id),
                page_size=size - len(found),
                cursor=cursor,
            )
        return pb.ListPricesResponse(prices=[*found, *map(_entry, rows)], next_cursor=next_cursor)

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
        if not 0 < at <= _MAX_TIME:
            raise HelixError(ErrorKind.UNPROCESSABLE, "This is no moment that a price can be for.", param="at")
        if (ref := self._lookup.configured.get(subject)) is not None:
            (entry,) = await _entries_at(self._lookup, [ref], at, now)
            return entry
        async with invocation.reading() as unit:
            rows = (await unit.connection.execute(_valid_at(subject, at))).all()
        if rows:
            # Of a deployment that is not configured here, or of a model.
            return _entry(min(rows, key=lambda row: row.subject_kind != DEPLOYMENT))
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


async def set_price(unit: Unit, request: pb.SetPriceRequest) -> pb.PriceEntry:
    """Raises `HelixError` UNPROCESSABLE naming the field."""
    kind, subject = request.subject_kind, _check_subject(request.subject_kind, request.subject)
    price = parse_rates(request.rates)
    valid_from, valid_to = _check_validity(request, unit.now)
    predecessor = await _make_room(unit, kind, subject, valid_from, valid_to)
    await keep_version(unit.connection, price, unit.now)
    if predecessor is not None:
        ended = update(prices).where(prices.c.id == predecessor.id).values(valid_to=valid_from)
        await unit.connection.execute(ended)
    row = {
        "id": f"price_{secrets.token_hex(12)}",
        "subject_kind": kind,
        "subject": subject,
        "price_version": price.version,
        "valid_from": valid_from,
        "valid_to": valid_to,
        "created_at": unit.now,
    }
    await unit.connection.execute(insert(prices).values(row))
    await unit.change(CHANGE_KIND_PRICES, "")
    before = None if predecessor is None else _visible(predecessor.price_version, predecessor)
    unit.record(_TARGET, row["id"], before=before, after={**_visible_new(row), "rates": _rates_of(price)})
    return _make_entry(price, kind, subject, valid_from, valid_to or 0, unit.now)
