"""Setting prices and ending them. A price once in force is never changed or taken away, only ended."""

import re
import secrets
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from sqlalchemy import and_, delete, insert, or_, select, update

from helixflow.auth.audit.entry import INSTALLATION
from helixflow.auth.price_lookup import DEPLOYMENT, MODEL, SET_PRICES, SetPrice
from helixflow.auth.price_rates import parse_rates, show_rates
from helixflow.auth.price_versions import keep_version
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_PRICES
from helixflow.storage.schema import prices

_TARGET: Final = "price"
_MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}")
_DEPLOYMENT_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}/[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
MAX_TIME: Final = 253_402_300_799  # the end of the year 9999


async def set_price(unit: Unit, request: pb.SetPriceRequest) -> pb.PriceEntry:
    """Raises `HelixError` UNPROCESSABLE naming the field."""
    kind, subject = _check_subject(request.subject_kind, request.subject)
    price = parse_rates(request.rates)
    valid_from, valid_to = _check_validity(request, unit.now)
    new = SetPrice(f"price_{secrets.token_hex(12)}", kind, subject, price, valid_from, valid_to, unit.now)
    predecessor = await _make_room(unit, new)
    await keep_version(unit.connection, price, unit.now)
    await unit.connection.execute(
        insert(prices).values(
            id=new.id,
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
    return price_entry(new)


async def end_price(unit: Unit, request: pb.EndPriceRequest) -> pb.PriceEntry:
    """What it is from then on; one that was withdrawn ends where it begins.

    Raises `HelixError`: NOT_FOUND, CONFLICT for one that has ended already, UNPROCESSABLE.
    """
    row = (await unit.connection.execute(SET_PRICES.where(prices.c.id == request.id))).first()
    if row is None:
        raise HelixError(ErrorKind.NOT_FOUND, f"There is no price {request.id!r}.", param="id")
    if row.valid_to is not None and row.valid_to <= unit.now:
        raise HelixError(ErrorKind.CONFLICT, f"This price has ended already, at {_shown(row.valid_to)}.")
    at = request.at or unit.now
    if not unit.now <= at <= MAX_TIME:
        message = "A price ends now or later: what was rated keeps its price."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="at")
    if row.valid_to is not None and at >= row.valid_to:
        message = f"It ends before that, at {_shown(row.valid_to)}: to have it longer, set it again from then on."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="at")
    before = SetPrice.of(row)
    after = replace(before, valid_to=max(at, row.valid_from))
    if at <= row.valid_from:
        await _withdraw(unit, before)
    else:
        ended = update(prices).where(prices.c.id == row.id).values(valid_to=at, ended_by=None)
        await unit.connection.execute(ended)
    await unit.change(CHANGE_KIND_PRICES, "")
    became = _visible(after) if at > row.valid_from else None
    unit.record(_TARGET, row.subject, before=_visible(before), after=became, organisation_id=INSTALLATION)
    return price_entry(after)


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
    ended = update(prices).where(prices.c.id == predecessor.id).values(valid_to=new.valid_from, ended_by=new.id)
    await unit.connection.execute(ended)
    return SetPrice.of(predecessor)


async def _withdraw(unit: Unit, price: SetPrice) -> None:
    """As if it had never been set: what it ended goes on, until another one begins."""
    await unit.connection.execute(delete(prices).where(prices.c.id == price.id))
    following = (
        select(prices.c.id, prices.c.valid_from)
        .where(prices.c.subject_kind == price.kind, prices.c.subject == price.subject)
        .where(prices.c.valid_from > price.valid_from)
        .order_by(prices.c.valid_from)
        .limit(1)
    )
    successor = (await unit.connection.execute(following)).first()
    values = {"valid_to": None, "ended_by": None}
    if successor is not None:
        values = {"valid_to": successor.valid_from, "ended_by": successor.id}
    await unit.connection.execute(update(prices).where(prices.c.ended_by == price.id).values(values))


def price_entry(found: SetPrice) -> pb.PriceEntry:
    """As the API shows it."""
    return pb.PriceEntry(
        id=found.id,
        version=found.price.version,
        subject_kind=found.kind,
        subject=found.subject,
        rates=show_rates(found.price),
        valid_from=found.valid_from,
        valid_to=found.valid_to or 0,
        source=found.price.source,
        created_at=found.created_at,
    )


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
    if not now <= valid_from <= MAX_TIME:
        message = "A price begins now or later: what was rated keeps its price."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="valid_from")
    if valid_to is not None and not valid_from < valid_to <= MAX_TIME:
        raise HelixError(ErrorKind.UNPROCESSABLE, "A price ends after it has begun.", param="valid_to")
    return valid_from, valid_to


def _visible(found: SetPrice) -> dict[str, Any]:
    return {
        "id": found.id,
        "subject_kind": found.kind,
        "price_version": found.price.version,
        "rates": MessageToDict(show_rates(found.price), preserving_proto_field_name=True),
        "valid_from": found.valid_from,
        "valid_to": found.valid_to,
    }


def _shown(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
