"""API keys: made, shown, changed, rotated and revoked.

A key never lets anybody do through it what they may not do themselves: who makes, changes or rotates one must hold
all that it allows, wherever it allows it. Revoking needs no more than that permission.
Of the permissions of the installation, `metrics:read` alone can be a scope, and only operators give it.
"""

import secrets
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import ColumnElement, Row, and_, insert, select, update

from helixflow.auth.authority import limits_of_caller
from helixflow.auth.dispatch import Operation
from helixflow.auth.grants import parse_scopes
from helixflow.auth.issuers import end_fallen_of_keys
from helixflow.auth.owners import OwnerKind, choose_owner, read_owner
from helixflow.auth.paging import read_page
from helixflow.auth.projects import authorise_in
from helixflow.auth.restrictions import (
    Restrictions,
    parse_expiry,
    parse_models,
    parse_networks,
    parse_scopes_given,
)
from helixflow.auth.shares import check_priority, check_weight
from helixflow.auth.texts import check_name
from helixflow.auth.unit import Unit
from helixflow.auth.versions import check_version, revise
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.keys import generate_key, hash_key, mask_key
from helixflow.core.permissions import DEFAULT_SCOPES, Permission
from helixflow.core.principal import DEFAULT_WEIGHT
from helixflow.rpc.generated.auth_v1 import admin_pb2
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_KEY
from helixflow.storage.schema import api_keys

MAX_OVERLAP_S: Final = 30 * 86_400
_TARGET: Final = "key"


async def create_key(unit: Unit, request: admin_pb2.CreateKeyRequest) -> admin_pb2.CreateKeyResponse:
    """A new key and its secret, which is not kept."""
    project_id = request.project_id or unit.caller.project_id
    if not project_id:
        message = "Say in which project: your credential is for none in particular."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="project_id")
    await authorise_in(unit, project_id)
    owner = await choose_owner(unit, request.owner_id, project_id)
    scopes = parse_scopes_given(request.scopes, operator=unit.caller.operator) or DEFAULT_SCOPES
    restrictions = Restrictions(
        parse_models(request.models), parse_networks(request.networks), parse_expiry(request.expires_at, unit.now)
    )
    name = check_name(request.name)
    share = (
        await check_priority(unit.connection, unit.caller.organisation_id, request.priority),
        check_weight(request.weight, "weight"),
    )
    owner.check_caller(unit.caller, scopes)
    owner.check_scopes(scopes)
    (await limits_of_caller(unit)).check_covers(restrictions)
    secret = generate_key()
    row = await insert_key(
        unit,
        secret,
        name=name,
        organisation_id=unit.caller.organisation_id,
        project_id=project_id,
        owner_id=owner.id,
        scopes=scopes,
        restrictions=restrictions,
        share=share,
    )
    unit.record(_TARGET, row.id, after=describe(row))
    return admin_pb2.CreateKeyResponse(key=to_proto(row), secret=secret)


async def list_keys(unit: Unit, request: admin_pb2.ListInProjectRequest) -> admin_pb2.ListKeysResponse:
    """Keys of a project, or of all whose keys the caller may see; also revoked and expired ones."""
    query = select(api_keys).where(api_keys.c.organisation_id == unit.caller.organisation_id)
    if request.project_id:
        await authorise_in(unit, request.project_id)
        query = query.where(api_keys.c.project_id == request.project_id)
    elif (visible := unit.authorise_some()) is not None:
        query = query.where(api_keys.c.project_id.in_(sorted(visible)))
    order = (api_keys.c.created_at, api_keys.c.id)
    rows, cursor = await read_page(unit.connection, query, order, page_size=request.page_size, cursor=request.cursor)
    return admin_pb2.ListKeysResponse(keys=[to_proto(row) for row in rows], next_cursor=cursor)


async def get_key(unit: Unit, request: admin_pb2.GetRequest) -> admin_pb2.Key:
    return to_proto(await _find(unit, request.id))


async def update_key(unit: Unit, request: admin_pb2.UpdateKeyRequest) -> admin_pb2.Key:
    """Changes name, scopes and restrictions of a key that works, within the rules for new ones."""
    row = await _find_changeable(unit, request.id, request.if_version)
    owner = await read_owner(unit, row.owner_id, row.project_id)
    owner.check_caller(unit.caller, parse_scopes(row.scopes))
    # Before anything changes: a key may be about to change itself.
    own_limits = await limits_of_caller(unit)
    values: dict[str, Any] = {}
    if request.HasField("name"):
        values["name"] = check_name(request.name)
    if request.HasField("scopes"):
        scopes = parse_scopes_given(request.scopes.values, operator=unit.caller.operator)
        if not scopes:
            message = "A key needs at least one scope. Revoke it instead, if it should do nothing."
            raise HelixError(ErrorKind.UNPROCESSABLE, message, param="scopes")
        owner.check_caller(unit.caller, scopes)
        owner.check_scopes(scopes)
        values["scopes"] = sorted(scopes)
    if request.HasField("models"):
        values["models"] = list(parse_models(request.models.values))
    if request.HasField("networks"):
        values["networks"] = list(parse_networks(request.networks.values))
    if request.HasField("expires_at"):
        values["expires_at"] = parse_expiry(request.expires_at, unit.now)
    if request.HasField("priority"):
        values["priority"] = await check_priority(unit.connection, row.organisation_id, request.priority)
    if request.HasField("weight"):
        values["weight"] = check_weight(request.weight, "weight")
    changed = await change_key(unit, row, values)
    # What the key is afterwards counts, whoever restricted it.
    own_limits.check_covers(Restrictions.of(changed))
    return to_proto(changed)


async def rotate_key(unit: Unit, request: admin_pb2.RotateKeyRequest) -> admin_pb2.CreateKeyResponse:
    """A new key like the old one, which goes on for `overlap_s` or until it expires anyway. Once for each key.

    Limits and budgets of the old one hold for the new one too, together with it: they go on counting.
    """
    if not 0 <= request.overlap_s <= MAX_OVERLAP_S:
        message = f"The old key may go on for 0 to {MAX_OVERLAP_S} seconds (30 days)."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="overlap_s")
    row = await _find_changeable(unit, request.id, request.if_version)
    owner = await read_owner(unit, row.owner_id, row.project_id)
    if owner.kind is OwnerKind.ACCOUNT and owner.id != unit.caller.subject_id:
        message = "Not permitted: the key is somebody's own, and only they may have its successor. You may revoke it."
        raise HelixError(ErrorKind.PERMISSION_DENIED, message)
    scopes = parse_scopes(row.scopes)
    # Whoever rotates a key gets one that works.
    owner.check_caller(unit.caller, scopes)
    (await limits_of_caller(unit)).check_covers(Restrictions.of(row))
    secret = generate_key()
    successor = await insert_key(
        unit,
        secret,
        name=row.name,
        organisation_id=row.organisation_id,
        project_id=row.project_id,
        owner_id=row.owner_id,
        scopes=scopes,
        restrictions=Restrictions.of(row),
        share=(row.priority, row.weight),
        rotated_from=row.id,
    )
    ends_at = unit.now + request.overlap_s
    values: Mapping[str, Any] = {"expires_at": ends_at if row.expires_at is None else min(ends_at, row.expires_at)}
    if request.overlap_s == 0:
        values = {"revoked_at": unit.now}
    replaced = await change_key(unit, row, values)
    unit.record(_TARGET, successor.id, after=describe(successor))
    return admin_pb2.CreateKeyResponse(key=to_proto(successor), secret=secret, replaced=to_proto(replaced))


async def revoke_key(unit: Unit, request: admin_pb2.ChangeRequest) -> admin_pb2.Key:
    """Revokes for good; a second time changes nothing.

    A bootstrap key that gave way to another one is from then on as good as revoked by hand.
    """
    row = await _find(unit, request.id)
    check_version(row.version, request.if_version)
    if row.bootstrap and not unit.caller.operator:
        message = "Not permitted: only an operator of the installation may revoke its bootstrap key."
        raise HelixError(ErrorKind.PERMISSION_DENIED, message)
    if row.revoked_at is not None and not row.superseded:
        return to_proto(row)
    return to_proto(await change_key(unit, row, {"revoked_at": row.revoked_at or unit.now, "superseded": False}))


OPERATIONS: Final[Mapping[str, Operation]] = {
    "CreateKey": Operation(create_key),
    "ListKeys": Operation(list_keys),
    "GetKey": Operation(get_key),
    "UpdateKey": Operation(update_key),
    "RotateKey": Operation(rotate_key),
    "RevokeKey": Operation(revoke_key),
}


async def revoke_keys_of_owner(unit: Unit, owner_id: str, organisation_id: str | None = None) -> int:
    """Revokes the keys that act for an account or service account, in one organisation or with None in all.

    Tell the gateways of that OWNER. How many.
    """
    theirs = api_keys.c.owner_id == owner_id
    if organisation_id is not None:
        theirs = and_(theirs, api_keys.c.organisation_id == organisation_id)
    return await _revoke_where(unit, theirs)


async def revoke_keys_of_project(unit: Unit, project_id: str) -> int:
    """Revokes all keys of a project; tell the gateways of that PROJECT. How many."""
    return await _revoke_where(unit, api_keys.c.project_id == project_id)


async def revoke_keys_of_organisation(unit: Unit, organisation_id: str) -> int:
    """Revokes all keys of an organisation; tell the gateways of that ORGANISATION. How many."""
    return await _revoke_where(unit, api_keys.c.organisation_id == organisation_id)


async def insert_key(
    unit: Unit,
    secret: str,
    *,
    name: str,
    organisation_id: str,
    project_id: str,
    owner_id: str = "",
    scopes: frozenset[Permission] = frozenset(),
    restrictions: Restrictions = Restrictions(),  # noqa: B008  (immutable)
    share: tuple[int, int] = (0, DEFAULT_WEIGHT),
    rotated_from: str | None = None,
    bootstrap: bool = False,
) -> Row[Any]:
    """Stores the hash of `secret` and what belongs to it; checks nothing. `share` is its priority and weight."""
    values = {
        "id": f"key_{secrets.token_hex(12)}",
        "hash": hash_key(secret),
        "hint": mask_key(secret),
        "name": name,
        "organisation_id": organisation_id,
        "project_id": project_id,
        "owner_id": owner_id,
        "scopes": sorted(scopes),
        "models": list(restrictions.models),
        "networks": list(restrictions.networks),
        "priority": share[0],
        "weight": share[1],
        "created_by": unit.caller.subject_id,
        "rotated_from": rotated_from,
        "created_at": unit.now,
        "updated_at": unit.now,
        "expires_at": restrictions.expires_at,
        "revoked_at": None,
        "superseded": False,
        "bootstrap": bootstrap,
        "version": 1,
    }
    return (await unit.connection.execute(insert(api_keys).values(values).returning(*api_keys.c))).one()


async def change_key(unit: Unit, row: Row[Any], values: Mapping[str, Any]) -> Row[Any]:
    """Stores what is new in `values`, records it and tells the gateways to forget the key. Checks nothing."""
    changed = await revise(unit, api_keys, row, values)
    if changed is not row:
        await unit.change(CHANGE_KIND_KEY, row.id, organisation_id=row.organisation_id, key_hash=row.hash)
        unit.record(_TARGET, row.id, before=describe(row), after=describe(changed))
        if (changed.scopes, changed.revoked_at) != (row.scopes, row.revoked_at):
            await end_fallen_of_keys(unit, api_keys.c.id == row.id)
    return changed


def describe(row: Row[Any]) -> dict[str, Any]:
    """What the audit log says of a key: nothing that could be one."""
    shown = ("name", "project_id", "owner_id", "scopes", "models", "networks", "expires_at", "revoked_at")
    described = {name: getattr(row, name) for name in shown}
    if (row.priority, row.weight) != (0, DEFAULT_WEIGHT):
        described |= {"priority": row.priority, "weight": row.weight}
    if row.rotated_from is not None:
        described["rotated_from"] = row.rotated_from
    if row.bootstrap:
        described |= {"bootstrap": True, "superseded": row.superseded}
    return described


def to_proto(row: Row[Any]) -> admin_pb2.Key:
    return admin_pb2.Key(
        id=row.id,
        name=row.name,
        hint=row.hint,
        project_id=row.project_id,
        owner_id=row.owner_id,
        scopes=row.scopes,
        models=row.models,
        networks=row.networks,
        created_at=row.created_at,
        updated_at=row.updated_at,
        expires_at=row.expires_at or 0,
        revoked_at=row.revoked_at or 0,
        rotated_from=row.rotated_from or "",
        bootstrap=row.bootstrap,
        version=row.version,
        created_by=row.created_by,
        priority=row.priority,
        weight=row.weight,
    )


async def _find(unit: Unit, key_id: str) -> Row[Any]:
    """The row of a key of the caller's organisation, for which the caller has the operation's permission."""
    own = api_keys.c.organisation_id == unit.caller.organisation_id
    row = await _read(unit, own & (api_keys.c.id == key_id))
    if row is None:
        raise HelixError(ErrorKind.NOT_FOUND, "There is no such key.", param="id")
    unit.authorise(row.project_id)
    return row


async def _find_changeable(unit: Unit, key_id: str, if_version: int) -> Row[Any]:
    """As `_find`, for a key that works and has no successor. Raises `HelixError` CONFLICT for others."""
    row = await _find(unit, key_id)
    check_version(row.version, if_version)
    if row.bootstrap:
        raise _conflict(
            "The bootstrap key stays as it is. To have another one, set HELIXFLOW_BOOTSTRAP_API_KEY or revoke it."
        )
    if row.revoked_at is not None:
        raise _conflict("The key is revoked. Create another one.")
    if row.expires_at is not None and unit.now >= row.expires_at:
        raise _conflict("The key has expired. Create another one.")
    successor = await _read(unit, api_keys.c.rotated_from == row.id)
    if successor is not None:
        raise _conflict(f"The key was rotated: change its successor {successor.id}, or revoke this one.")
    return row


async def _revoke_where(unit: Unit, which: ColumnElement[bool]) -> int:
    revoked = await unit.connection.execute(
        update(api_keys)
        .where(which, api_keys.c.revoked_at.is_(None))
        .values(revoked_at=unit.now, updated_at=unit.now, version=api_keys.c.version + 1)
    )
    await end_fallen_of_keys(unit, which)
    return revoked.rowcount


async def _read(unit: Unit, which: ColumnElement[bool]) -> Row[Any] | None:
    return (await unit.connection.execute(select(api_keys).where(which))).first()


def _conflict(message: str) -> HelixError:
    return HelixError(ErrorKind.CONFLICT, message)
