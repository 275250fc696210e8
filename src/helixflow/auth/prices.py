"""Prices that operators set, and what holds where none is set. A price once in force is never changed or taken away."""

import re
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from sqlalchemy import Select, and_, insert, or_, update

from helixflow.auth.audit.entry import INSTALLATION
from helixflow.auth.dispatch import Conversation, Flow, Invocation, Operation
from helixflow.auth.paging import DEFAULT_SIZE, MAX_SIZE, read_page
from helixflow.auth.price_lookup import DEPLOYMENT, MODEL, SET_PRICES, PriceLookup, SetPrice, Timeline
from helixflow.auth.price_rates import SET, parse_rates, show_rates
from helixflow.auth.price_versions import keep_version
from helixflow.auth.rating import RatingCheck
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.prices import Price, decode_price
from helixflow.rpc.generated.auth_v1 import metering_pb2
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_PRICES
from helixflow.storage.schema import prices

_TARGET: Final = "price"
_MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}")
_DEPLOYMENT_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}/[a-z0-9_]{1,50}-[0-9]{1,5}")
_MAX_TIME: Final = 253_402_300_799  # the end of the year 9999
# A list begins with what nobody has set; cursors within that part are counts, those of `paging` never begin so.
_UNSET_CURSOR: Final = re.compile(r"unset-([0-9]{1,6})")


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
            prices=[*found, *(_entry(SetPrice.of(row)) for row in rows)], next_cursor=next_cursor
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
        if not 0 < at <= _MAX_TIME:
            raise HelixError(ErrorKind.UNPROCESSABLE, "This is no moment that a price can be for.", param="at")
        if (ref := self._lookup.configured.get(subject)) is not None:
            (entry,) = await _entries_at(self._lookup, [ref], at, now)
            return entry
        async with invocation.reading() as unit:
            rows = (await unit.connection.execute(_valid_at(subject, at))).all()
        if rows:
            # Of a model, or of a deployment that is not configured here.
            return _entry(SetPrice.of(rows[0]))
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
    kind, subject = _check_subject(request.subject_kind, request.subject)
    price = parse_rates(request.rates)
    valid_from, valid_to = _check_validity(request, unit.now)
    new = SetPrice(kind, subject, price, valid_from, valid_to, unit.now)
    predecessor = await _make_room(unit, new)
    await keep_version(unit.connection, price, unit.now)
    await unit.connection.execute(
        insert(prices).values(
            id=f"price_{secrets.token_hex(12)}",
            subject_kind=kind,
            subject=subject,
            price_version=price.version,
            valid_from=valid_from,
            valid_to=valid_to,
            created_at=unit.now,
        )
    )
    await unit.change(CHANGE_KIND_PRICES, "")
    before = _visible(predecessor) if predecessor is not None else None
    unit.record(_TARGET, subject, before=before, after=_visible(new), organisation_id=INSTALLATION)
    return _entry(new)


async def _make_room(unit: Unit, new: SetPrice) -> SetPrice | None:
    """Ends an open-ended predecessor where the new price begins, and returns it as it was. Raises UNPROCESSABLE for
    validities that would overlap.
    """
    same = and_(prices.c.subject_kind == new.kind, prices.c.subject == new.subject)
    after = or_(prices.c.valid_to.is_(None), prices.c.valid_to > new.valid_from)
    rows = (await unit.connection.execute(SET_PRICES.where(same, after).order_by(prices.c.valid_from))).all()
    predecessor = None
    for row in rows:
        if row.valid_from > new.valid_from:
            if new.valid_to is None or new.valid_to > row.valid_from:
                message = f"Another price begins at {_shown(row.valid_from)}: end then or earlier."
                raise HelixError(ErrorKind.UNPROCESSABLE, message, param="valid_to")
        elif row.valid_from == new.valid_from:
            message = f"Another price begins at {_shown(row.valid_from)}: begin later."
            raise HelixError(ErrorKind.UNPROCESSABLE, message, param="valid_from")
        elif row.valid_to is not None:
            message = f"Another price holds until {_shown(row.valid_to)}: begin then or later."
            raise HelixError(ErrorKind.UNPROCESSABLE, message, param="valid_from")
        else:
            predecessor = row
    if predecessor is None:
        return None
    ended = update(prices).where(prices.c.id == predecessor.id).values(valid_to=new.valid_from)
    await unit.connection.execute(ended)
    return SetPrice.of(predecessor)


def _check_subject(kind: str, subject: str) -> tuple[str, str]:
    if kind not in (MODEL, DEPLOYMENT):
        message = "A price is for a model or for a deployment."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="subject_kind")
    if not (_MODEL_NAME if kind == MODEL else _DEPLOYMENT_NAME).fullmatch(subject):
        message = "This is no name of a model." if kind == MODEL else "A deployment is named as in gpt-4o/openai-0."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="subject")
    return kind, subject


def _check_validity(request: pb.SetPriceRequest, now: int) -> tuple[int, int | None]:
    valid_from, valid_to = request.valid_from or now, request.valid_to or None
    if not now <= valid_from <= _MAX_TIME:
        message = "A price begins now or later: what was rated keeps its price."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="valid_from")
    if valid_to is not None and not valid_from < valid_to <= _MAX_TIME:
        raise HelixError(ErrorKind.UNPROCESSABLE, "A price ends after it has begun.", param="valid_to")
    return valid_from, valid_to


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
        return found.price, _entry(found)
    first = timeline.periods(at * 1000)[0]
    return first.price, pb.PriceEntry(
        version=first.price.version,
        subject_kind=DEPLOYMENT,
        subject=timeline.ref.deployment,
        rates=show_rates(first.price),
        valid_to=(first.to_ms or 0) // 1000,
        source=first.price.source,
    )


def _entry(found: SetPrice) -> pb.PriceEntry:
    return pb.PriceEntry(
        version=found.price.version,
        subject_kind=found.kind,
        subject=found.subject,
        rates=show_rates(found.price),
        valid_from=found.valid_from,
        valid_to=found.valid_to or 0,
        source=found.price.source,
        created_at=found.created_at,
    )


def _visible(found: SetPrice) -> dict[str, Any]:
    return {
        "subject_kind": found.kind,
        "price_version": found.price.version,
        "rates": MessageToDict(show_rates(found.price), preserving_proto_field_name=True),
        "valid_from": found.valid_from,
        "valid_to": found.valid_to,
    }


def _shown(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
