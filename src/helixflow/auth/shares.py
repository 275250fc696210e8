"""What organisations and keys get of engines that are full, and where an organisation's calls may be served."""

import re
from dataclasses import dataclass
from typing import Final

from sqlalchemy import bindparam, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.principal import DEFAULT_WEIGHT
from helixflow.storage.schema import organisations

WEIGHTS: Final = range(1, 10_001)
# Of keys. An organisation's highest is 0 unless an operator allows more.
PRIORITIES: Final = range(-10, 11)
_REGION: Final = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_SHARES: Final = select(organisations.c.share_weight, organisations.c.max_priority, organisations.c.residency).where(
    organisations.c.id == bindparam("organisation_id")
)


@dataclass(frozen=True, slots=True)
class Shares:
    """Of an organisation."""

    weight: int
    max_priority: int
    residency: str


async def read_shares(connection: AsyncConnection, organisation_id: str) -> Shares:
    """Of an organisation that there is."""
    row = (await connection.execute(_SHARES, {"organisation_id": organisation_id})).one()
    return Shares(row.share_weight, row.max_priority, row.residency)


def check_weight(weight: int, param: str) -> int:
    """`weight`; 0 is the default one. Raises `HelixError` UNPROCESSABLE."""
    weight = weight or DEFAULT_WEIGHT
    if weight not in WEIGHTS:
        message = f"A weight is {WEIGHTS[0]} to {WEIGHTS[-1]}."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param=param)
    return weight


async def check_priority(connection: AsyncConnection, organisation_id: str, priority: int) -> int:
    """`priority` of a key of that organisation. Raises `HelixError` UNPROCESSABLE when it may not be so high."""
    highest = PRIORITIES[-1]
    if priority > 0:
        highest = (await read_shares(connection, organisation_id)).max_priority
    if not PRIORITIES[0] <= priority <= highest:
        message = (
            f"Priorities of this organisation's keys are {PRIORITIES[0]} to {highest}; "
            "an operator can allow higher ones (helixflow orgs shares)."
        )
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="priority")
    return priority


def check_max_priority(priority: int) -> int:
    if not 0 <= priority <= PRIORITIES[-1]:
        message = f"The highest priority of an organisation's keys is 0 to {PRIORITIES[-1]}."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="max_priority")
    return priority


def check_residency(region: str) -> str:
    if region and not _REGION.fullmatch(region):
        message = "A region is 1 to 63 of a-z, 0-9, '.', '_' and '-', such as 'eu'; empty for any."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="residency")
    return region
