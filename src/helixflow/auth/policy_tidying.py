"""The end of policies on what has ended, and of old events: they would only fill lists, and cost sums."""

from typing import Any, Final

from sqlalchemy import ColumnElement, Select, Table, and_, delete, exists, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.key_chains import with_successors
from helixflow.metering.policies import Scope
from helixflow.storage.engine import Database
from helixflow.storage.schema import (
    accounts,
    api_keys,
    budget_events,
    budgets,
    limits,
    organisations,
    projects,
    service_accounts,
)

# A year of months, and some.
EVENTS_KEPT_S: Final = 400 * 86_400


async def prune_policies(database: Database, now: int) -> None:
    """For housekeeping; `now` is seconds since the epoch. Gateways need not be told: nobody is left to ask for them."""
    async with database.writing() as connection:
        await drop_policies_of_ended(connection, now)
        await connection.execute(delete(budget_events).where(budget_events.c.at < now - EVENTS_KEPT_S))


async def drop_policies_of_ended(connection: AsyncConnection, now: int) -> None:
    """Deletes those on deleted organisations, projects and users, and on keys that will not work again, nor any that
    they were rotated to.
    """
    for table in (limits, budgets):
        await connection.execute(delete(table).where(_on_ended(table, now)))
    gone = exists().where(
        organisations.c.id == budget_events.c.organisation_id, organisations.c.deleted_at.is_not(None)
    )
    await connection.execute(delete(budget_events).where(gone))


def _on_ended(table: Table, now: int) -> ColumnElement[bool]:
    subject_id = table.c.subject_id
    ended = {
        Scope.PROJECT: exists().where(projects.c.id == subject_id, projects.c.deleted_at.is_not(None)),
        Scope.USER: or_(
            exists().where(accounts.c.id == subject_id, accounts.c.deleted_at.is_not(None)),
            exists().where(service_accounts.c.id == subject_id, service_accounts.c.deleted_at.is_not(None)),
        ),
        Scope.KEY: subject_id.not_in(_alive(table, now)),
    }
    organisation = exists().where(
        organisations.c.id == table.c.organisation_id, organisations.c.deleted_at.is_not(None)
    )
    return or_(organisation, *(and_(table.c.scope == scope.value, gone) for scope, gone in ended.items()))


def _alive(table: Table, now: int) -> "Select[Any]":
    """The keys with policies that work, or were rotated to one that does."""
    chain = with_successors(select(table.c.subject_id).where(table.c.scope == Scope.KEY.value))
    # A bootstrap key that gave way to another one may come back.
    works = and_(
        or_(api_keys.c.revoked_at.is_(None), api_keys.c.superseded),
        or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now),
    )
    return select(chain.c.first).join(api_keys, api_keys.c.id == chain.c.id).where(works)
