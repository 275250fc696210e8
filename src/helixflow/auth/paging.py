"""Pages of a list by keyset: a cursor says after which row to go on, so that pages neither repeat nor skip rows."""

import base64
import binascii
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, Row, Select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.core.errors import ErrorKind, HelixError

DEFAULT_SIZE: Final = 20
MAX_SIZE: Final = 100
# Of a name of 100 characters outside the BMP, with an id.
_MAX_CURSOR: Final = 1024
_Position = tuple[int | str, str]
_decoder = msgspec.json.Decoder(_Position)


async def read_page(
    connection: AsyncConnection,
    query: "Select[Any]",
    keys: tuple[ColumnElement[Any], ColumnElement[Any]],
    *,
    page_size: int,
    cursor: str,
    descending: bool = True,
) -> tuple[Sequence[Row[Any]], str]:
    """Up to `page_size` rows (0: 20) of `query`, and the cursor of the next page, '' after the last one.

    `keys` are two columns of the query that order it and together are unique; the rows must have them under their own
    names. Raises `HelixError` UNPROCESSABLE for a size out of range or a cursor that is not ours.
    """
    if not 0 <= page_size <= MAX_SIZE:
        raise HelixError(ErrorKind.UNPROCESSABLE, f"A page has 1 to {MAX_SIZE} entries.", param="limit")
    size = page_size or DEFAULT_SIZE
    if cursor:
        position = tuple_(*_parse(cursor, keys[0]))
        query = query.where(tuple_(*keys) < position if descending else tuple_(*keys) > position)
    order = [key.desc() if descending else key.asc() for key in keys]
    rows = (await connection.execute(query.order_by(*order).limit(size + 1))).all()
    if len(rows) <= size:
        return rows, ""
    last = rows[size - 1]
    return rows[:size], _render((getattr(last, _name(keys[0])), getattr(last, _name(keys[1]))))


def _name(column: ColumnElement[Any]) -> str:
    return str(getattr(column, "name", None) or getattr(column, "key", ""))


def _render(position: _Position) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(position)).decode().rstrip("=")


def _parse(cursor: str, first: ColumnElement[Any]) -> _Position:
    try:
        if len(cursor) > _MAX_CURSOR:
            raise ValueError("too long")
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        position: _Position = _decoder.decode(text)
        if not isinstance(position[0], first.type.python_type) or "\0" in f"{position[0]}{position[1]}":
            raise ValueError("of another list")
        if isinstance(position[0], int) and not -(2**63) <= position[0] < 2**63:
            raise ValueError("out of range")
    except (ValueError, binascii.Error, msgspec.MsgspecError) as exc:
        raise HelixError(ErrorKind.UNPROCESSABLE, "The cursor is not one that this list gave.", param="cursor") from exc
    return position
