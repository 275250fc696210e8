"""How many requests were recorded lately, by model and deployment: what a change of the configuration touches."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import func, select

from helixflow.auth.grants import Reader
from helixflow.storage.schema import organisations, usage_hourly

SPAN_S: Final = 86_400


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests of the last 24 hours and of the hour that was begun before."""

    of_models: Counter[str] = field(default_factory=Counter)
    of_deployments: Counter[str] = field(default_factory=Counter)


async def recent_traffic(reader: Reader, now: int) -> Traffic:
    """Over all organisations. `now` is seconds since the epoch."""
    columns = usage_hourly.c
    query = (
        select(columns.model, columns.deployment, func.sum(columns.requests).label("requests"))
        # By organisation and time the table has an index, by time alone it has none.
        .where(columns.organisation_id.in_(select(organisations.c.id)))
        .where(columns.start > now - SPAN_S - 3600)
        .group_by(columns.model, columns.deployment)
    )
    traffic = Traffic()
    for row in await reader.execute(query):
        traffic.of_models[row.model] += int(row.requests)
        if row.deployment:
            traffic.of_deployments[row.deployment] += int(row.requests)
    return traffic
