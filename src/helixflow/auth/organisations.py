"""Organisations: what all else belongs to. Nothing in one is seen from another. `dissolution` deletes them."""

import secrets
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from sqlalchemy import Row, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.audit.entry import INSTALLATION
from helixflow.auth.dispatch import Operation
from helixflow.auth.invitations import describe_invitation, invite, is_member
from helixflow.auth.paging import read_page
from helixflow.auth.projects import DEFAULT_PROJECT_ID, DEFAULT_PROJECT_NAME, insert_project
from helixflow.auth.shares import check_max_priority, check_residency, check_weight
from helixflow.auth.texts import check_email, check_name
from helixflow.auth.unit import Unit
from helixflow.auth.versions import check_version, revise
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import OWNER
from helixflow.core.principal import DEFAULT_WEIGHT
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_ORGANISATION
from helixflow.storage.engine import Database
from helixflow.storage.schema import organisations, projects

# Fixed: made once, found again.
DEFAULT_ORGANISATION_ID: Final = "org_default"
_DEFAULT_NAME: Final = "Default"
_RETENTION_DAYS: Final = range(30, 3651)
NEW_ORGANISATION: Final = {
    "audit_retention_days": 0,
    "residency": "",
    "share_weight": DEFAULT_WEIGHT,
    "max_priority": 0,
}


async def ensure_defaults(database: Database, now: int) -> None:
    """Makes the first organisation and its project unless they exist. `now` is seconds since the epoch."""
    async with database.writing() as connection:
        if await _find(connection, DEFAULT_ORGANISATION_ID) is not None:
            return
        stamps = {"created_at": now, "updated_at": now, "version": 1}
        await connection.execute(
            insert(organisations).values(id=DEFAULT_ORGANISATION_ID, name=_DEFAULT_NAME, **NEW_ORGANISATION, **stamps)
        )
        await connection.execute(
            insert(projects).values(
                id=DEFAULT_PROJECT_ID,
                organisation_id=DEFAULT_ORGANISATION_ID,
                name=DEFAULT_PROJECT_NAME,
                **stamps,
            )
        )


async def create_organisation(
    unit: Unit, request: pb.CreateOrganisationRequest, *, token_life_s: int
) -> pb.CreateOrganisationResponse:
    name, email = check_name(request.name), check_email(request.owner_email, "owner_email")
    statement = insert(organisations).values(
        id=f"org_{secrets.token_hex(12)}",
        name=name,
        **NEW_ORGANISATION,
        created_at=unit.now,
        updated_at=unit.now,
        version=1,
    )
    row = (await unit.connection.execute(statement.returning(*organisations.c))).one()
    project = await insert_project(unit, row.id, DEFAULT_PROJECT_NAME)
    invitation, token = await invite(unit, row.id, email, OWNER, token_life_s=token_life_s)
    after = {**describe_organisation(row), "project_id": project.id, "owner_email": email}
    for chain in (INSTALLATION, row.id):
        unit.record("organisation", row.id, after=after, organisation_id=chain)
    return pb.CreateOrganisationResponse(organisation=_message(row), invitation=invitation, invitation_token=token)


async def invite_owner(unit: Unit, request: pb.InviteOwnerRequest, *, token_life_s: int) -> pb.InviteUserResponse:
    """For an organisation whose owners cannot sign in: operators are not members of it, and cannot help otherwise."""
    row = await _find(unit.connection, request.organisation_id)
    if row is None or row.deleted_at is not None:
        message = f"There is no organisation {request.organisation_id!r}."
        raise HelixError(ErrorKind.NOT_FOUND, message, param="organisation_id")
    email = check_email(request.owner_email, "owner_email")
    if await is_member(unit, row.id, email):
        message = "This user is a member there. Invite another e-mail, which as an owner can promote or reset them."
        raise HelixError(ErrorKind.CONFLICT, message, param="owner_email")
    invitation, token = await invite(unit, row.id, email, OWNER, token_life_s=token_life_s)
    for chain in (INSTALLATION, row.id):
        after = {**describe_invitation(invitation), "organisation_id": row.id}
        unit.record("invitation", invitation.id, after=after, organisation_id=chain)
    return pb.InviteUserResponse(invitation=invitation, token=token)


async def list_organisations(unit: Unit, request: pb.ListRequest) -> pb.ListOrganisationsResponse:
    rows, cursor = await read_page(
        unit.connection,
        select(organisations).where(organisations.c.deleted_at.is_(None)),
        (organisations.c.name, organisations.c.id),
        page_size=request.page_size,
        cursor=request.cursor,
        descending=False,
    )
    return pb.ListOrganisationsResponse(organisations=map(_message, rows), next_cursor=cursor)


async def get_organisation(unit: Unit, request: pb.GetRequest) -> pb.Organisation:
    return _message(await find_own_organisation(unit, request.id))


async def update_organisation(unit: Unit, request: pb.UpdateOrganisationRequest) -> pb.Organisation:
    row = await find_own_organisation(unit, request.id)
    check_version(row.version, request.if_version)
    values: dict[str, Any] = {}
    if request.HasField("name"):
        values["name"] = check_name(request.name)
    if request.HasField("audit_retention_days"):
        values["audit_retention_days"] = _check_retention(request.audit_retention_days)
    if request.HasField("residency"):
        values["residency"] = check_residency(request.residency)
    after = await revise(unit, organisations, row, values)
    if after is not row:
        unit.record("organisation", row.id, before=describe_organisation(row), after=describe_organisation(after))
        if after.residency != row.residency:
            await unit.change(CHANGE_KIND_ORGANISATION, row.id, organisation_id=row.id)
    return _message(after)


async def set_shares(unit: Unit, request: pb.SetSharesRequest) -> pb.Organisation:
    """Keys with a priority that is not allowed any more have the highest allowed one from now on."""
    row = await _find(unit.connection, request.organisation_id)
    if row is None or row.deleted_at is not None:
        raise HelixError(
            ErrorKind.NOT_FOUND, f"There is no organisation {request.organisation_id!r}.", param="organisation_id"
        )
    check_version(row.version, request.if_version)
    values: dict[str, Any] = {}
    if request.HasField("share_weight"):
        values["share_weight"] = check_weight(request.share_weight, "share_weight")
    if request.HasField("max_priority"):
        values["max_priority"] = check_max_priority(request.max_priority)
    after = await revise(unit, organisations, row, values)
    if after is not row:
        before, changed = describe_organisation(row), describe_organisation(after)
        for chain in (INSTALLATION, row.id):
            unit.record("organisation", row.id, before=before, after=changed, organisation_id=chain)
        await unit.change(CHANGE_KIND_ORGANISATION, row.id, organisation_id=row.id)
    return _message(after)


async def find_own_organisation(unit: Unit, organisation_id: str) -> Row[Any]:
    """That of the caller. Raises `HelixError` NOT_FOUND for any other id."""
    row = None
    if organisation_id == unit.caller.organisation_id:
        row = await _find(unit.connection, organisation_id)
    if row is None or row.deleted_at is not None:
        raise HelixError(ErrorKind.NOT_FOUND, f"There is no organisation {organisation_id!r}.", param="id")
    return row


async def _find(connection: AsyncConnection, organisation_id: str) -> Row[Any] | None:
    return (await connection.execute(select(organisations).where(organisations.c.id == organisation_id))).first()


def _check_retention(days: int) -> int:
    if days != 0 and days not in _RETENTION_DAYS:
        message = f"Audit records are kept for {_RETENTION_DAYS[0]} to {_RETENTION_DAYS[-1]} days, or for ever (0)."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="audit_retention_days")
    return days


def describe_organisation(row: Row[Any]) -> dict[str, Any]:
    """What the audit log says of an organisation."""
    described = {"name": row.name, "audit_retention_days": row.audit_retention_days}
    for name in ("residency", "share_weight", "max_priority"):
        if getattr(row, name) != NEW_ORGANISATION[name]:
            described[name] = getattr(row, name)
    return described


def _message(row: Row[Any]) -> pb.Organisation:
    return pb.Organisation(
        id=row.id,
        name=row.name,
        created_at=row.created_at,
        updated_at=row.updated_at,
        version=row.version,
        audit_retention_days=row.audit_retention_days,
        residency=row.residency,
        share_weight=row.share_weight,
        max_priority=row.max_priority,
    )


def operations(token_life_s: int) -> Mapping[str, Operation]:
    """`token_life_s`: how long an invitation works."""
    return {
        "CreateOrganisation": Operation(partial(create_organisation, token_life_s=token_life_s)),
        "InviteOwner": Operation(partial(invite_owner, token_life_s=token_life_s)),
        "ListOrganisations": Operation(list_organisations),
        "GetOrganisation": Operation(get_organisation),
        "UpdateOrganisation": Operation(update_organisation),
        "SetShares": Operation(set_shares),
    }
