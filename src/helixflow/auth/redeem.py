"""RedeemToken: an invitation makes an account, or joins one to an organisation; a reset sets a password.

Who invites is shown the token. It must not let them into an account that exists: accepting needs its password. Nor may
it bring them back once they are gone: a token works only while its issuer could still issue it (`issuers`).

Accepting asks for no second factor, also where the account has one: it signs nobody in, and whoever wants to use the
new membership meets the second factor at the sign-in.
"""

import secrets
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Row, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.dispatch import Invocation
from helixflow.auth.grants import permissions_of_role
from helixflow.auth.issuers import stands
from helixflow.auth.lockout import Lockout
from helixflow.auth.one_time_tokens import Purpose, find, use
from helixflow.auth.own_account import set_password
from helixflow.auth.passwords import Passwords
from helixflow.auth.proof import PasswordProof, find_account, find_account_by_email, recheck
from helixflow.auth.sessions import EndReason, end_sessions
from helixflow.auth.sign_in import become
from helixflow.auth.texts import check_name, email_key
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import identity_pb2
from helixflow.rpc.generated.auth_v1 import sessions_pb2 as pb
from helixflow.storage.schema import accounts, memberships, organisations, projects

_PURPOSES: Final = (Purpose.INVITE, Purpose.RESET)


@dataclass(frozen=True, slots=True)
class _Found:
    """A token that works, and the account that it is for, if there is one."""

    token: Row[Any]
    account: Row[Any] | None

    @property
    def resets(self) -> bool:
        return bool(self.token.purpose == Purpose.RESET.value)


class Redeem:
    """Looks the token up, does what takes long, looks it up again and uses it: of two at once, one finds it used."""

    def __init__(self, passwords: Passwords, proof: PasswordProof, lockout: Lockout) -> None:
        self._passwords = passwords
        self._proof = proof
        self._lockout = lockout

    async def redeem(self, invocation: Invocation, request: pb.RedeemTokenRequest) -> pb.RedeemTokenResponse:
        if await find(invocation.lookups, request.token, _PURPOSES, invocation.now) is None:
            raise _refusal()
        async with invocation.reading() as unit:
            found = await _find(unit, request.token)
        if found.account is not None and not found.resets:
            proven = await self._proof.by_email(invocation, found.token.email, request.password)
            async with invocation.writing() as unit:
                return await self._accept(unit, request, proven)
        if found.account is not None:
            email, name = found.account.email, found.account.name
        else:
            email, name = found.token.email, check_name(request.name) if request.name else ""
        new_hash = await self._passwords.hash_new(request.password, email=email, name=name)
        async with invocation.writing() as unit:
            again = await _find(unit, request.token)
            if again.account is not None and again.resets:
                return await self._reset(unit, again.token, again.account, new_hash)
            if again.account is not None:
                raise HelixError(ErrorKind.CONFLICT, "This e-mail has an account by now. Redeem it with its password.")
            return await self._create(unit, again.token, name, new_hash)

    async def _reset(self, unit: Unit, token: Row[Any], account: Row[Any], new_hash: str) -> pb.RedeemTokenResponse:
        become(unit, account, account.home_organisation_id)
        await use(unit, token.id)
        await set_password(unit, account.id, new_hash)
        await self._lockout.forgive(unit, account.email)
        ended = await end_sessions(unit, account.id, None, EndReason.PASSWORD)
        unit.record("user", account.id, after={"purpose": token.purpose, "sessions_ended": ended})
        return pb.RedeemTokenResponse(account_id=account.id, email=account.email)

    async def _create(self, unit: Unit, token: Row[Any], name: str, new_hash: str) -> pb.RedeemTokenResponse:
        stamps = {"created_at": unit.now, "updated_at": unit.now, "version": 1}
        account_id = f"user_{secrets.token_hex(12)}"
        made = insert(accounts).values(
            id=account_id,
            email=token.email,
            email_key=email_key(token.email),
            name=name,
            password_hash=new_hash,
            home_organisation_id=token.organisation_id,
            operator=False,
            totp_used=0,
            **stamps,
        )
        account = (await unit.connection.execute(made.returning(*accounts.c))).one()
        return await _join(unit, token, account)

    async def _accept(self, unit: Unit, request: pb.RedeemTokenRequest, proven: Row[Any]) -> pb.RedeemTokenResponse:
        found = await _find(unit, request.token)
        account = await recheck(unit, proven)
        if account.suspended_at is not None:
            raise HelixError(ErrorKind.PERMISSION_DENIED, "Not permitted: this account is suspended.")
        return await _join(unit, found.token, account)


async def _find(unit: Unit, token: str) -> _Found:
    row = await find(unit.connection, token, _PURPOSES, unit.now)
    if row is not None and not await stands(unit, row):
        row = None
    account = None
    if row is not None and row.purpose == Purpose.RESET.value:
        account = await find_account(unit.connection, row.account_id)
        row = row if account is not None else None
    elif row is not None:
        account = await find_account_by_email(unit.connection, row.email)
        row = row if await _place_exists(unit.connection, row.organisation_id, row.project_id) else None
    if row is None:
        raise _refusal()
    return _Found(row, account)


def _refusal() -> HelixError:
    message = "The token has expired or was used. Ask for a new one."
    return HelixError(ErrorKind.INVALID_TOKEN, message, param="token")


async def _place_exists(connection: AsyncConnection, organisation_id: str, project_id: str) -> bool:
    query = select(organisations.c.id).where(
        organisations.c.id == organisation_id, organisations.c.deleted_at.is_(None)
    )
    if project_id:
        query = query.join(projects, projects.c.organisation_id == organisations.c.id).where(
            projects.c.id == project_id, projects.c.deleted_at.is_(None)
        )
    return (await connection.execute(query)).first() is not None


async def _join(unit: Unit, token: Row[Any], account: Row[Any]) -> pb.RedeemTokenResponse:
    """Gives `account` the role of the invitation, in the account's own name."""
    if await permissions_of_role(unit.connection, token.organisation_id, token.role) is None:
        message = f"The role {token.role!r} does not exist any more. Ask for a new invitation."
        raise HelixError(ErrorKind.CONFLICT, message)
    place = {"account_id": account.id, "organisation_id": token.organisation_id, "project_id": token.project_id}
    if (await unit.connection.execute(select(memberships.c.role).filter_by(**place))).first() is not None:
        raise HelixError(ErrorKind.CONFLICT, "This account is a member there already.")
    await use(unit, token.id)
    await unit.connection.execute(
        insert(memberships).values(**place, role=token.role, created_at=unit.now, updated_at=unit.now, version=1)
    )
    await unit.change(identity_pb2.CHANGE_KIND_OWNER, account.id, organisation_id=token.organisation_id)
    become(unit, account, token.organisation_id)
    after = {"email": account.email, "role": token.role, "project_id": token.project_id, "purpose": token.purpose}
    unit.record("user", account.id, after=after)
    return pb.RedeemTokenResponse(account_id=account.id, email=account.email)
