"""Users of an organisation: accounts whose home it is, and accounts that are members of it.

Only its home organisation may change an account. Others see it while it is a member of theirs.

Whoever resets an account, or gives it another e-mail, can sign in as it, with its roles in other organisations too.
Those are not the home's to give: while the account may change users or members of another organisation, only operators
and the account itself do that, others get a CONFLICT. With lesser roles elsewhere it is done, and the audit logs of all
organisations in which the account is a member say so.

An e-mail has one account in the whole installation, so whoever may create accounts can find out whether a certain
e-mail has one: the sign-in that they made works or does not, whatever we answer. `CreateUser`, and `UpdateUser` with a
new e-mail, therefore refuse one that is taken, in the same words wherever that account is, and tell nothing else of it.
`InviteUser` does not even tell that.
"""

import secrets
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from sqlalchemy import Row, and_, insert, or_, select

from helixflow.auth.authority import check_may_take_over, check_outranks, check_role, check_unrestricted
from helixflow.auth.dispatch import Operation
from helixflow.auth.one_time_tokens import Purpose, issue
from helixflow.auth.paging import read_page
from helixflow.auth.passwords import Passwords
from helixflow.auth.places import organisations_of
from helixflow.auth.texts import check_email, check_name, email_key
from helixflow.auth.unit import Unit
from helixflow.auth.versions import check_version, revise
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.storage.schema import accounts, memberships

_ROLE: Final = "role"


async def find_user(unit: Unit, user_id: str, param: str = "id") -> Row[Any]:
    """The account of a user of the caller's organisation, with `role`, its role there or None.

    Raises `HelixError` NOT_FOUND, also for users of other organisations only.
    """
    query = _users(unit.caller.organisation_id).where(accounts.c.id == user_id)
    row = (await unit.connection.execute(query)).first()
    if row is None:
        raise HelixError(ErrorKind.NOT_FOUND, f"There is no user {user_id!r}.", param=param)
    return row


async def find_user_to_change(unit: Unit, user_id: str) -> Row[Any]:
    """As `find_user`, for changes of the account itself. Raises `HelixError` NOT_FOUND or PERMISSION_DENIED."""
    row = await find_user(unit, user_id)
    if row.home_organisation_id != unit.caller.organisation_id:
        raise HelixError(
            ErrorKind.PERMISSION_DENIED,
            "Not permitted: this account belongs to another organisation. Here its membership can be changed.",
        )
    await check_outranks(unit, row)
    return row


async def hash_first_password(passwords: Passwords, request: pb.CreateUserRequest) -> str | None:
    """The hash of the request's password, None when it has none: before the transaction. Raises UNPROCESSABLE."""
    email, name = check_email(request.email), check_name(request.name)
    if not request.password:
        return None
    return await passwords.hash_new(request.password, email=email, name=name)


async def create_user(unit: Unit, request: pb.CreateUserRequest, *, token_life_s: int) -> pb.CreateUserResponse:
    """`unit.prepared` is what `hash_first_password` gave."""
    await check_unrestricted(unit)
    if request.operator and not unit.caller.operator:
        raise HelixError(ErrorKind.PERMISSION_DENIED, "Not permitted: only operators can make operators.")
    if request.role:
        await check_role(unit, request.role, "")
    await _check_email_is_free(unit, request.email)
    organisation_id = unit.caller.organisation_id
    stamps = {"created_at": unit.now, "updated_at": unit.now, "version": 1}
    account_id = f"user_{secrets.token_hex(12)}"
    await unit.connection.execute(
        insert(accounts).values(
            id=account_id,
            email=request.email,
            email_key=email_key(request.email),
            name=request.name,
            password_hash=unit.prepared,
            home_organisation_id=organisation_id,
            operator=request.operator,
            totp_used=0,
            **stamps,
        )
    )
    if request.role:
        place = {"account_id": account_id, "organisation_id": organisation_id, "project_id": ""}
        await unit.connection.execute(insert(memberships).values(**place, role=request.role, **stamps))
    row = await find_user(unit, account_id)
    unit.record("user", row.id, after=describe_user(row))
    answer = pb.CreateUserResponse(user=to_proto(row))
    if row.password_hash is None:
        answer.token, answer.token_expires_at = await issue_reset(unit, row, token_life_s)
    return answer


async def issue_reset(unit: Unit, row: Row[Any], token_life_s: int) -> tuple[str, int]:
    """A token that sets a password for the account of `row`, and when it expires."""
    _, token = await issue(
        unit,
        Purpose.RESET,
        organisation_id=row.home_organisation_id,
        life_s=token_life_s,
        account_id=row.id,
        email=row.email,
    )
    return token, unit.now + token_life_s


async def list_users(unit: Unit, request: pb.ListUsersRequest) -> pb.ListUsersResponse:
    query = _users(unit.caller.organisation_id)
    if request.email:
        query = query.where(accounts.c.email_key == email_key(request.email))
    rows, cursor = await read_page(
        unit.connection,
        query,
        (accounts.c.created_at, accounts.c.id),
        page_size=request.page_size,
        cursor=request.cursor,
    )
    return pb.ListUsersResponse(users=map(to_proto, rows), next_cursor=cursor)


async def get_user(unit: Unit, request: pb.GetRequest) -> pb.User:
    return to_proto(await find_user(unit, request.id))


async def update_user(unit: Unit, request: pb.UpdateUserRequest) -> pb.User:
    row = await find_user_to_change(unit, request.id)
    check_version(row.version, request.if_version)
    values: dict[str, Any] = {}
    if request.HasField("name"):
        values["name"] = check_name(request.name)
    if request.HasField("email"):
        key = email_key(check_email(request.email))
        if key != row.email_key:
            await check_unrestricted(unit)
            await check_may_take_over(unit, row)
            await _check_email_is_free(unit, request.email)
        values |= {"email": request.email, "email_key": key}
    if await revise(unit, accounts, row, values) is row:
        return to_proto(row)
    after = await find_user(unit, row.id)
    unit.record("user", row.id, before=describe_user(row), after=describe_user(after))
    if after.email_key != row.email_key:
        await record_elsewhere(unit, row, after)
    return to_proto(after)


async def record_elsewhere(unit: Unit, row: Row[Any], after: Row[Any]) -> None:
    """Tells the audit logs of the other organisations in which the account is a member how its sign-in changed."""
    for organisation_id in await organisations_of(unit.connection, row.id):
        if organisation_id != unit.caller.organisation_id:
            unit.record("user", row.id, before=_sign_in(row), after=_sign_in(after), organisation_id=organisation_id)


async def _check_email_is_free(unit: Unit, email: str) -> None:
    found = await unit.connection.execute(select(accounts.c.id).where(accounts.c.email_key == email_key(email)))
    if found.first() is not None:
        raise HelixError(
            ErrorKind.CONFLICT, "This e-mail is taken. If it is that of a colleague, invite them.", param="email"
        )


def _users(organisation_id: str) -> Any:
    members = select(memberships.c.account_id).where(memberships.c.organisation_id == organisation_id)
    own = and_(
        memberships.c.account_id == accounts.c.id,
        memberships.c.organisation_id == organisation_id,
        memberships.c.project_id == "",
    )
    return (
        select(accounts, memberships.c.role.label(_ROLE))
        .outerjoin(memberships, own)
        .where(
            accounts.c.deleted_at.is_(None),
            or_(accounts.c.home_organisation_id == organisation_id, accounts.c.id.in_(members)),
        )
    )


def status(row: Row[Any]) -> str:
    """`suspended`, `invited` (no password yet) or `active`."""
    if row.suspended_at is not None:
        return "suspended"
    return "active" if row.password_hash is not None else "invited"


def describe_user(row: Row[Any]) -> dict[str, Any]:
    """What the audit log says of a user from `find_user`."""
    return {
        "email": row.email,
        "name": row.name,
        "status": status(row),
        "role": row.role or "",
        "mfa_enabled": row.totp_confirmed_at is not None,
        "operator": row.operator,
    }


def _sign_in(row: Row[Any]) -> dict[str, Any]:
    described = describe_user(row)
    return {name: described[name] for name in ("email", "status", "mfa_enabled")}


def to_proto(row: Row[Any]) -> pb.User:
    """A user from `find_user` as the API shows it."""
    return pb.User(
        id=row.id,
        email=row.email,
        name=row.name,
        status=status(row),
        home_organisation_id=row.home_organisation_id,
        mfa_enabled=row.totp_confirmed_at is not None,
        role=row.role or "",
        created_at=row.created_at,
        updated_at=row.updated_at,
        last_login_at=row.last_login_at or 0,
        version=row.version,
        operator=row.operator,
    )


def operations(passwords: Passwords, token_life_s: int) -> Mapping[str, Operation]:
    """`token_life_s`: how long a token for the first password works."""
    return {
        "CreateUser": Operation(
            partial(create_user, token_life_s=token_life_s), prepare=partial(hash_first_password, passwords)
        ),
        "ListUsers": Operation(list_users),
        "GetUser": Operation(get_user),
        "UpdateUser": Operation(update_user),
    }
