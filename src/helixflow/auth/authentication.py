"""From a credential to the caller behind it, with the permissions that it has at this moment."""

from collections.abc import Callable, Iterable
from ipaddress import ip_address, ip_network
from typing import Any, Final

from sqlalchemy import Row, bindparam, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.caller import Caller, CallerKind, CallerRefused, Source
from helixflow.auth.grants import ALL, NOTHING, Held, Reader, grants_of_account, grants_of_role, parse_scopes
from helixflow.core.claims import AccessClaims
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.keys import PREFIX, hash_key, is_well_formed
from helixflow.core.permissions import Grants
from helixflow.storage.schema import accounts, api_keys, organisations, projects, service_accounts, sessions

# Checks signature and times of an access token; raises `HelixError` INVALID_TOKEN.
ReadToken = Callable[[str], AccessClaims]


class Authentication:
    """Tells callers by access tokens and API keys, always against the database: nothing is cached here.

    What a token says of roles is not believed: they are looked up.
    """

    def __init__(self, read_token: ReadToken, clock: Clock) -> None:
        self._read_token = read_token
        self._clock = clock

    async def identify(self, connection: AsyncConnection, credential: str, source: Source) -> Caller:
        """The caller of `credential` ('' is nobody).

        Raises `HelixError` INVALID_TOKEN or INVALID_API_KEY, and `CallerRefused` for an API key in a wrong network.
        """
        if not credential:
            return Caller(CallerKind.ANONYMOUS, source=source)
        if credential.startswith(PREFIX):
            return await self._by_key(connection, credential, source)
        return await self._by_token(connection, self._read_token(credential), source)

    async def _by_token(self, connection: AsyncConnection, claims: AccessClaims, source: Source) -> Caller:
        row = (
            await connection.execute(
                select(accounts.c.name, accounts.c.email, accounts.c.operator)
                .join(sessions, sessions.c.account_id == accounts.c.id)
                .join(organisations, organisations.c.id == sessions.c.organisation_id)
                .where(
                    sessions.c.id == claims.sid,
                    accounts.c.id == claims.sub,
                    sessions.c.organisation_id == claims.org,
                    sessions.c.ended_at.is_(None),
                    sessions.c.expires_at > int(self._clock.now()),
                    accounts.c.suspended_at.is_(None),
                    accounts.c.deleted_at.is_(None),
                    organisations.c.deleted_at.is_(None),
                )
            )
        ).first()
        held = await grants_of_account(connection, claims.sub, claims.org) if row is not None else None
        if row is None or held is None:
            raise HelixError(ErrorKind.INVALID_TOKEN, "The session has ended. Sign in again.")
        return Caller(
            CallerKind.ACCOUNT,
            claims.sub,
            row.name or row.email,
            claims.org,
            claims.project,
            session_id=claims.sid,
            roles=held.roles,
            grants=held.grants,
            operator=row.operator,
            source=source,
        )

    async def _by_key(self, connection: AsyncConnection, key: str, source: Source) -> Caller:
        row = None
        if is_well_formed(key):
            row = await find_key(connection, hash_key(key))
        held = await held_by_key(connection, row, self._clock.now()) if row is not None else None
        if row is None or held is None:
            raise HelixError(ErrorKind.INVALID_API_KEY, "The API key is unknown, expired or revoked.")
        caller = Caller(
            CallerKind.KEY,
            row.id,
            row.name,
            row.organisation_id,
            row.project_id,
            owner_id=row.owner_id,
            roles=held.roles,
            grants=held.grants,
            operator=row.bootstrap,
            source=source,
        )
        if row.networks and not _is_within(source.address, row.networks):
            raise CallerRefused(caller, "The API key may not be used from this address.")
        return caller


def _is_within(address: str, networks: Iterable[str]) -> bool:
    try:
        parsed = ip_address(address)
        return any(parsed in ip_network(network) for network in networks)
    except ValueError:
        # An address that nobody knows is in no network.
        return False


# Built once: making a statement takes longer than to run it.
_FIND_KEY: Final = (
    select(
        api_keys,
        projects.c.deleted_at.label("project_deleted_at"),
        organisations.c.deleted_at.label("organisation_deleted_at"),
        organisations.c.share_weight.label("organisation_share_weight"),
        organisations.c.max_priority.label("organisation_max_priority"),
        organisations.c.residency.label("organisation_residency"),
        service_accounts.c.id.label("service_account_id"),
        service_accounts.c.project_id.label("service_account_project_id"),
        service_accounts.c.role.label("service_account_role"),
        service_accounts.c.suspended_at.label("service_account_suspended_at"),
        service_accounts.c.deleted_at.label("service_account_deleted_at"),
        accounts.c.id.label("account_id"),
        accounts.c.suspended_at.label("account_suspended_at"),
        accounts.c.deleted_at.label("account_deleted_at"),
    )
    .join(projects, projects.c.id == api_keys.c.project_id)
    .join(organisations, organisations.c.id == api_keys.c.organisation_id)
    .outerjoin(service_accounts, service_accounts.c.id == api_keys.c.owner_id)
    .outerjoin(accounts, accounts.c.id == api_keys.c.owner_id)
    .where(api_keys.c.hash == bindparam("key_hash"))
)


async def find_key(reader: Reader, key_hash: bytes) -> Row[Any] | None:
    """The row of a key with all that decides whether it works: project, organisation, service account, account."""
    return (await reader.execute(_FIND_KEY, {"key_hash": key_hash})).first()


async def held_by_key(reader: Reader, row: Row[Any], now: float) -> Held | None:
    """What the key of a row from `find_key` allows at `now` (seconds since the epoch); None when it does not work.

    A key of the project itself has its scopes in that project. One that acts for somebody has what its owner may do, as
    far as its scopes go. The bootstrap key is an owner of its organisation.
    """
    if row.revoked_at is not None or row.project_deleted_at is not None or row.organisation_deleted_at is not None:
        return None
    if row.expires_at is not None and now >= row.expires_at:
        return None
    if row.bootstrap:
        return ALL
    scopes = parse_scopes(row.scopes)
    if not row.owner_id:
        return Held(Grants(projects={row.project_id: scopes}))
    if row.service_account_id is not None:
        if row.service_account_suspended_at is not None or row.service_account_deleted_at is not None:
            return None
        held = await grants_of_role(
            reader, row.organisation_id, row.service_account_project_id, row.service_account_role
        )
    elif row.account_id is not None:
        if row.account_suspended_at is not None or row.account_deleted_at is not None:
            return None
        member = await grants_of_account(reader, row.account_id, row.organisation_id)
        if member is None:
            return None
        held = member
    else:
        held = NOTHING
    return Held(held.grants.restricted_to(scopes), held.roles)
