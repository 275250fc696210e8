"""What budgets have spent in a period, by the ledger, and how amounts of money and of tokens are written."""

import re
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.ledger.spend import read_sums
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.money import format_dollars, parse_dollars
from helixflow.metering.policies import Period, period_bounds
from helixflow.metering.policies import Unit as BudgetUnit
from helixflow.rpc.generated.auth_v1 import metering_pb2

# Below 2^53: exact in Redis' scripts too.
MAX_TOKENS: Final = 9 * 10**15
_DAY_S: Final = 86_400
_COUNT: Final = re.compile(r"[0-9]{1,16}", re.ASCII)
# Milliseconds, (0, 0) for one without end.
Bounds = tuple[int, int]


def period_of(row: Row[Any], at: int) -> Bounds:
    """The period of a budget's row in which `at` lies, seconds since the epoch."""
    return period_bounds(Period(row.period), at // _DAY_S)


async def read_spent(connection: AsyncConnection, periods: Sequence[tuple[Row[Any], Bounds]]) -> list[int]:
    """Nanodollars or tokens, in the order of the budgets' rows and periods."""
    if not periods:
        return []
    return await read_sums(connection, [_query(row, bounds) for row, bounds in periods])


def _query(row: Row[Any], bounds: Bounds) -> metering_pb2.SpendQuery:
    return metering_pb2.SpendQuery(
        budget_id=row.id,
        scope=row.scope,
        subject_id=row.subject_id,
        organisation_id=row.organisation_id,
        unit=row.unit,
        from_ms=bounds[0],
        to_ms=bounds[1],
    )


def parse_cap(text: str, unit: BudgetUnit) -> int:
    """Nanodollars or tokens, more than none. Raises `HelixError` UNPROCESSABLE."""
    if unit is BudgetUnit.MONEY:
        try:
            amount = parse_dollars(text)
        except ValueError as exc:
            raise _bad_cap(f"The cap is no amount of money: {exc}.") from exc
    elif _COUNT.fullmatch(text) is None or (amount := int(text)) > MAX_TOKENS:
        raise _bad_cap(f"The cap is a whole number of tokens, at most {MAX_TOKENS}.")
    if amount == 0:
        raise _bad_cap("The cap is more than 0. To keep somebody out, revoke their key.")
    return amount


def format_amount(amount: int, unit: BudgetUnit) -> str:
    """A number of dollars, or of tokens."""
    return format_dollars(amount) if unit is BudgetUnit.MONEY else str(amount)


def _bad_cap(message: str) -> HelixError:
    return HelixError(ErrorKind.UNPROCESSABLE, message, param="cap")
