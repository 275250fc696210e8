"""Invitations and resets end with the rights of who issued them, and with the keys that they used."""

import secrets
from typing import Any

import pytest
from sqlalchemy import Table, update

from helixflow.core.errors import ErrorKind
from helixflow.core.permissions import ROLES
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.rpc.generated.auth_v1 import sessions_pb2
from helixflow.storage.schema import accounts, api_keys, memberships, one_time_tokens
from tests.harness.auth import Person, refused
from tests.harness.sessions import SignIns

NEW = "yet another pass phrase"


async def redeem(door: SignIns, token: str) -> Any:
    return await door.ask(None, "RedeemToken", sessions_pb2.RedeemTokenRequest(token=token, password=NEW))


async def invite(door: SignIns, caller: Person | str, role: str = "viewer", project: str = "") -> str:
    email = f"{secrets.token_hex(4)}@example.com"
    request = pb.InviteUserRequest(email=email, role=role, project_id=project)
    return str((await door.call(caller, "InviteUser", request)).token)


async def open_tokens(door: SignIns) -> list[tuple[str, str]]:
    return sorted((row.purpose, row.role) for row in await door.rows(one_time_tokens, used_at=None))


async def change_row(door: SignIns, table: Table, key: dict[str, str], **values: Any) -> None:
    """As if it had been done elsewhere: no operation ends any tokens then."""
    statement = update(table).where(*(table.c[name] == value for name, value in key.items())).values(**values)
    async with door.database.writing() as connection:
        await connection.execute(statement)


GOING = (
    ("SuspendUser", lambda bob: pb.ChangeRequest(id=bob.id)),
    ("DeleteUser", lambda bob: pb.DeleteRequest(id=bob.id)),
    ("RemoveMember", lambda bob: pb.RemoveMemberRequest(user_id=bob.id)),
    ("SetMember", lambda bob: pb.SetMemberRequest(user_id=bob.id, role="viewer")),
)


@pytest.mark.parametrize(("rpc", "request_for"), GOING, ids=[rpc for rpc, _ in GOING])
async def test_who_goes_does_not_come_back_by_what_they_issued(door: SignIns, rpc: str, request_for: Any) -> None:
    acme = await door.add_organisation()
    project = await door.add_project(acme)
    ada = await door.add_person(acme, roles={"": "owner"})
    bob = await door.add_person(acme, roles={"": "admin"})
    carol = await door.add_person(acme, roles={"": "viewer"})
    kept = await invite(door, ada, "owner")
    tokens = [
        await invite(door, bob, "admin"),
        await invite(door, bob, "viewer", project),
        (await door.call(bob, "ResetUser", pb.ChangeRequest(id=carol.id))).token,
        (await door.call(bob, "CreateUser", pb.CreateUserRequest(email="d@example.com", name="D"))).token,
    ]
    await door.call(ada, rpc, request_for(bob))
    assert await open_tokens(door) == [("invite", "owner")]
    for token in tokens:
        async with refused(ErrorKind.INVALID_TOKEN, "token"):
            await redeem(door, token)
    ended = [(row.action, row.actor_id) for row in await door.audited(acme) if row.action.startswith("revoke_")]
    assert sorted(ended) == 2 * [("revoke_invitation", ada.id)] + 2 * [("revoke_reset", ada.id)]
    assert (await redeem(door, kept)).account_id


async def test_who_is_reinstated_issues_anew(door: SignIns) -> None:
    acme = await door.add_organisation()
    ada, bob = [await door.add_person(acme, roles={"": "owner"}) for _ in range(2)]
    token = await invite(door, bob)
    for rpc in ("SuspendUser", "ReinstateUser"):
        await door.call(ada, rpc, pb.ChangeRequest(id=bob.id))
    async with refused(ErrorKind.INVALID_TOKEN, "token"):
        await redeem(door, token)


async def test_what_somebody_may_still_issue_goes_on(door: SignIns) -> None:
    acme = await door.add_organisation()
    ada, bob = [await door.add_person(acme, roles={"": "owner"}) for _ in range(2)]
    await invite(door, bob, "owner")
    kept = await invite(door, bob, "admin")
    await door.call(ada, "SetMember", pb.SetMemberRequest(user_id=bob.id, role="admin"))
    assert await open_tokens(door) == [("invite", "admin")]
    assert (await redeem(door, kept)).account_id


async def test_rights_are_asked_for_again_when_a_token_is_redeemed(door: SignIns) -> None:
    acme = await door.add_organisation()
    ada = await door.add_person(acme, roles={"": "owner"})
    permissions = ["users:create", "users:read", "users:update"]
    role = await door.call(ada, "CreateRole", pb.CreateRoleRequest(name="host", permissions=permissions))
    await door.call(ada, "CreateRole", pb.CreateRoleRequest(name="reader", permissions=["users:read"]))
    bob = await door.add_person(acme, roles={"": "host"})
    carol = await door.add_person(acme, email="carol@example.com")
    invitation = await invite(door, bob, "reader")
    reset = (await door.call(bob, "ResetUser", pb.ChangeRequest(id=carol.id))).token

    async def allow(permissions: list[str]) -> None:
        request = pb.UpdateRoleRequest(id=role.id, permissions=pb.StringList(values=permissions))
        await door.call(ada, "UpdateRole", request)

    async def refuses(*tokens: str) -> None:
        for token in tokens:
            async with refused(ErrorKind.INVALID_TOKEN, "token"):
                await redeem(door, token)

    await allow(["users:read"])
    await refuses(invitation, reset)
    # Not what they would give any more.
    await allow(["users:create", "users:update"])
    await refuses(invitation)
    await allow(permissions)
    await door.add_membership(carol.id, acme, "admin")
    await refuses(reset)
    await change_row(door, memberships, {"account_id": carol.id}, role="reader")
    await door.add_membership(carol.id, await door.add_organisation("Other"), "admin")
    await refuses(reset)
    await change_row(door, memberships, {"account_id": carol.id, "role": "admin"}, role="viewer")
    for gone in ({"suspended_at": door.now}, {"deleted_at": door.now}):
        await change_row(door, accounts, {"id": bob.id}, **gone)
        await refuses(invitation, reset)
        await change_row(door, accounts, {"id": bob.id}, suspended_at=None, deleted_at=None)
    for token in (invitation, reset):
        assert (await redeem(door, token)).account_id


KEYS = ("revoked", "without the scope", "of an owner who is suspended", "of an owner who has left")


@pytest.mark.parametrize("how", KEYS)
async def test_what_was_issued_with_a_key_ends_with_the_key(door: SignIns, how: str) -> None:
    acme = await door.add_organisation()
    project = await door.add_project(acme)
    ada, bob = [await door.add_person(acme, roles={"": "owner"}) for _ in range(2)]
    key_id, key = await door.add_key(acme, project, scopes=sorted(ROLES["owner"]), owner_id=bob.id)
    token = await invite(door, key)
    (row,) = await door.rows(one_time_tokens)
    assert (row.created_by, row.created_with) == (bob.id, key_id)
    kept = await invite(door, ada, "admin")
    rpc, request = {
        "revoked": ("RevokeKey", pb.ChangeRequest(id=key_id)),
        "without the scope": ("UpdateKey", pb.UpdateKeyRequest(id=key_id, scopes=pb.StringList(values=["keys:read"]))),
        "of an owner who is suspended": ("SuspendUser", pb.ChangeRequest(id=bob.id)),
        "of an owner who has left": ("RemoveMember", pb.RemoveMemberRequest(user_id=bob.id)),
    }[how]
    await door.call(ada, rpc, request)
    assert await open_tokens(door) == [("invite", "admin")]
    async with refused(ErrorKind.INVALID_TOKEN, "token"):
        await redeem(door, token)
    assert (await redeem(door, kept)).account_id


@pytest.mark.parametrize("how", ["suspended", "demoted", "deleted"])
async def test_what_a_service_account_issued_ends_with_it(door: SignIns, how: str) -> None:
    acme = await door.add_organisation()
    project = await door.add_project(acme)
    ada = await door.add_person(acme, roles={"": "owner"})
    program = await door.call(ada, "CreateServiceAccount", pb.CreateServiceAccountRequest(name="HR", role="admin"))
    _, key = await door.add_key(acme, project, scopes=sorted(ROLES["owner"]), owner_id=program.id)
    token = await invite(door, key)
    rpc, request = {
        "suspended": ("UpdateServiceAccount", pb.UpdateServiceAccountRequest(id=program.id, suspended=True)),
        "demoted": ("UpdateServiceAccount", pb.UpdateServiceAccountRequest(id=program.id, role="developer")),
        "deleted": ("DeleteServiceAccount", pb.DeleteRequest(id=program.id)),
    }[how]
    await door.call(ada, rpc, request)
    assert await open_tokens(door) == []
    async with refused(ErrorKind.INVALID_TOKEN, "token"):
        await redeem(door, token)


async def test_operators_stand_behind_owners_as_long_as_they_are_operators(door: SignIns) -> None:
    acme, other = await door.add_organisation(), await door.add_organisation("Other")
    project = await door.add_project(acme)
    chief = await door.add_person(acme, roles={"": "owner"}, operator=True)
    operator = await door.add_person(acme, roles={"": "viewer"}, operator=True)
    bootstrap_id, bootstrap = await door.add_key(acme, project, bootstrap=True)
    tokens = {}
    for name, caller in (("operator", operator), ("bootstrap", bootstrap), ("chief", chief)):
        made = pb.InviteOwnerRequest(organisation_id=other, owner_email=f"{name}@example.com")
        tokens[name] = (await door.call(caller, "InviteOwner", made)).token
    await change_row(door, accounts, {"id": operator.id}, operator=False)
    async with refused(ErrorKind.INVALID_TOKEN, "token"):
        await redeem(door, tokens["operator"])
    await change_row(door, accounts, {"id": operator.id}, operator=True)
    await change_row(door, api_keys, {"id": bootstrap_id}, revoked_at=door.now)
    async with refused(ErrorKind.INVALID_TOKEN, "token"):
        await redeem(door, tokens["bootstrap"])
    await door.call(chief, "RemoveMember", pb.RemoveMemberRequest(user_id=operator.id))
    # Who is a member nowhere cannot sign in, operator or not.
    async with refused(ErrorKind.INVALID_TOKEN, "token"):
        await redeem(door, tokens["operator"])
    account_id = (await redeem(door, tokens["chief"])).account_id
    (joined,) = await door.rows(memberships, account_id=account_id)
    assert (joined.organisation_id, joined.role) == (other, "owner")
