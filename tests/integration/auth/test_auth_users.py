from typing import Any

import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import ROLES
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_OWNER
from helixflow.storage.schema import accounts, api_keys, memberships, one_time_tokens, recovery_codes, sessions
from tests.harness.auth import TOKEN_LIFE_S, Installation, Person, refused

PASSWORD = "correct horse battery staple"


async def owner(auth: Installation) -> Person:
    return await auth.add_person(await auth.add_organisation(), roles={"": "owner"})


async def test_a_user_with_a_password_is_active_and_the_password_is_nowhere(auth: Installation) -> None:
    ada = await owner(auth)
    request = pb.CreateUserRequest(email="Bob@Example.com", name="Bob Ω", password=PASSWORD, role="developer")
    made = await auth.call(ada, "CreateUser", request)
    user = made.user
    assert (user.email, user.name, user.status, user.role) == ("Bob@Example.com", "Bob Ω", "active", "developer")
    assert (user.home_organisation_id, made.token, made.token_expires_at) == (ada.organisation_id, "", 0)
    assert user == await auth.call(ada, "GetUser", pb.GetRequest(id=user.id))
    (row,) = await auth.rows(accounts, id=user.id)
    assert await auth.passwords.verify(PASSWORD, row.password_hash)
    (record,) = await auth.audited(ada.organisation_id)
    assert (record.action, record.target_kind, record.target_id) == ("create_user", "user", user.id)
    assert PASSWORD not in record.after and row.password_hash not in record.after


async def test_a_user_without_a_password_gets_a_token_that_sets_one(auth: Installation) -> None:
    ada = await owner(auth)
    made = await auth.call(ada, "CreateUser", pb.CreateUserRequest(email="b@example.com", name="Bob"))
    assert (made.user.status, made.user.role) == ("invited", "")
    assert made.token.startswith("hft_") and made.token_expires_at == auth.now + TOKEN_LIFE_S
    (token,) = await auth.rows(one_time_tokens)
    assert (token.purpose, token.account_id, token.created_by) == ("reset", made.user.id, ada.id)
    (record,) = await auth.audited(ada.organisation_id)
    assert made.token not in record.after


async def test_bad_input_is_refused(auth: Installation) -> None:
    ada = await owner(auth)
    good = {"email": "b@example.com", "name": "Bob", "password": PASSWORD, "role": "viewer"}
    for param, value in (("email", "b"), ("email", "b@x\r\ny"), ("name", ""), ("password", "short"), ("role", "king")):
        async with refused(ErrorKind.UNPROCESSABLE, param):
            await auth.call(ada, "CreateUser", pb.CreateUserRequest(**{**good, param: value}))
    assert len(await auth.rows(accounts)) == 1


async def test_a_taken_email_is_refused_in_the_same_words_wherever_the_account_is(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)
    messages = set()
    for taken in (ada.email.upper(), eve.email):
        for rpc, request in (
            ("CreateUser", pb.CreateUserRequest(email=taken, name="Bob")),
            ("UpdateUser", pb.UpdateUserRequest(id=ada.id, email=taken)),
        ):
            if (rpc, taken) == ("UpdateUser", ada.email.upper()):
                continue
            try:
                await auth.call(ada, rpc, request)
            except HelixError as exc:
                messages.add((exc.kind, exc.param, exc.message))
    assert len(messages) == 1 and messages.pop()[0] is ErrorKind.CONFLICT


async def test_users_are_those_at_home_and_the_members_and_nobody_else(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)
    acme, other = ada.organisation_id, eve.organisation_id
    project = await auth.add_project(acme)
    no_role = await auth.add_person(acme)
    guest = await auth.add_person(acme, roles={project: "viewer"}, home=other)
    stranger = await auth.add_person(other, roles={"": "admin"})
    found = {user.id: user for user in (await auth.call(ada, "ListUsers", pb.ListUsersRequest())).users}
    assert set(found) == {ada.id, no_role.id, guest.id}
    assert [found[person.id].role for person in (ada, no_role, guest)] == ["owner", "", ""]
    assert found[guest.id].home_organisation_id == other
    for rpc, request in (
        ("GetUser", pb.GetRequest(id=stranger.id)),
        ("UpdateUser", pb.UpdateUserRequest(id=stranger.id, name="Mine")),
        ("SuspendUser", pb.ChangeRequest(id=stranger.id)),
        ("ResetUser", pb.ChangeRequest(id=stranger.id)),
        ("DeleteUser", pb.DeleteRequest(id=stranger.id)),
    ):
        async with refused(ErrorKind.NOT_FOUND, "id"):
            await auth.call(ada, rpc, request)


async def test_a_user_is_found_by_email_in_any_case_and_only_at_home(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)

    async def ids(email: str) -> list[str]:
        return [user.id for user in (await auth.call(ada, "ListUsers", pb.ListUsersRequest(email=email))).users]

    assert await ids(ada.email.upper()) == [ada.id]
    assert await ids(eve.email) == [] == await ids("' OR 1=1 --")


async def test_only_its_home_changes_an_account(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)
    guest = await auth.add_person(ada.organisation_id, roles={"": "viewer"}, home=eve.organisation_id)
    for rpc, request in (
        ("UpdateUser", pb.UpdateUserRequest(id=guest.id, name="Mine")),
        ("SuspendUser", pb.ChangeRequest(id=guest.id)),
        ("ReinstateUser", pb.ChangeRequest(id=guest.id)),
        ("ResetUser", pb.ChangeRequest(id=guest.id)),
        ("DeleteUser", pb.DeleteRequest(id=guest.id)),
    ):
        async with refused(ErrorKind.PERMISSION_DENIED):
            await auth.call(ada, rpc, request)
        assert (await auth.audited(ada.organisation_id))[-1].outcome == "denied"
    await auth.call(eve, "SuspendUser", pb.ChangeRequest(id=guest.id))


async def test_nobody_touches_who_holds_more(auth: Installation) -> None:
    ada = await owner(auth)
    acme = ada.organisation_id
    project = await auth.add_project(acme)
    admin = await auth.add_person(acme, roles={"": "admin"})
    project_owner = await auth.add_person(acme, roles={"": "viewer", project: "owner"})
    operator = await auth.add_person(acme, roles={"": "viewer"}, operator=True)
    for target in (ada, project_owner, operator):
        for rpc, request in (
            ("UpdateUser", pb.UpdateUserRequest(id=target.id, email="mine@example.com")),
            ("SuspendUser", pb.ChangeRequest(id=target.id)),
            ("ResetUser", pb.ChangeRequest(id=target.id)),
            ("DeleteUser", pb.DeleteRequest(id=target.id)),
            ("EndUserSessions", pb.EndUserSessionsRequest(user_id=target.id)),
        ):
            async with refused(ErrorKind.PERMISSION_DENIED):
                await auth.call(admin, rpc, request)
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(ada, "ResetUser", pb.ChangeRequest(id=operator.id))
    await auth.call(ada, "ResetUser", pb.ChangeRequest(id=project_owner.id))


async def test_nobody_gives_a_new_user_more_than_they_have(auth: Installation) -> None:
    ada = await owner(auth)
    admin = await auth.add_person(ada.organisation_id, roles={"": "admin"})
    request = pb.CreateUserRequest(email="b@example.com", name="Bob", role="owner")
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(admin, "CreateUser", request)
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(ada, "CreateUser", pb.CreateUserRequest(email="b@example.com", name="Bob", operator=True))
    await auth.call(ada, "CreateUser", request)
    operator = await auth.add_person(ada.organisation_id, roles={"": "admin"}, operator=True)
    made = await auth.call(operator, "CreateUser", pb.CreateUserRequest(email="c@x.org", name="C", operator=True))
    assert made.user.operator


async def test_an_update_changes_name_and_email_and_is_recorded(auth: Installation) -> None:
    ada = await owner(auth)
    bob = await auth.add_person(ada.organisation_id, roles={"": "viewer"}, email="bob@example.com")
    request = pb.UpdateUserRequest(id=bob.id, if_version=1, name="Robert", email="BOB@example.com")
    user = await auth.call(ada, "UpdateUser", request)
    assert (user.name, user.email, user.version) == ("Robert", "BOB@example.com", 2)
    (record,) = await auth.audited(ada.organisation_id)
    assert '"name":"Somebody"' in record.before and '"name":"Robert"' in record.after
    assert (await auth.call(ada, "UpdateUser", pb.UpdateUserRequest(id=bob.id, name="Robert"))).version == 2
    for refusal in (pb.UpdateUserRequest(id=bob.id, name=""), pb.UpdateUserRequest(id=bob.id, email="")):
        async with refused(ErrorKind.UNPROCESSABLE, "email" if refusal.HasField("email") else "name"):
            await auth.call(ada, "UpdateUser", refusal)
    async with refused(ErrorKind.PRECONDITION_FAILED):
        await auth.call(ada, "UpdateUser", pb.UpdateUserRequest(id=bob.id, if_version=1, name="Rob"))


async def test_suspension_ends_sessions_and_stops_keys_until_reinstated(auth: Installation) -> None:
    ada = await owner(auth)
    acme = ada.organisation_id
    project = await auth.add_project(acme)
    bob = await auth.add_person(acme, roles={"": "developer"})
    _, key = await auth.add_key(acme, project, scopes=["projects:read"], owner_id=bob.id)
    assert (await auth.call(ada, "SuspendUser", pb.ChangeRequest(id=bob.id))).status == "suspended"
    async with refused(ErrorKind.INVALID_TOKEN):
        await auth.call(bob, "ListProjects", pb.ListRequest())
    async with refused(ErrorKind.INVALID_API_KEY):
        await auth.call(key, "ListProjects", pb.ListRequest())
    assert [row.end_reason for row in await auth.rows(sessions, account_id=bob.id)] == ["suspended"]
    # In all organisations, not only in this one.
    assert (CHANGE_KIND_OWNER, bob.id, "") in await auth.told()
    told = len(await auth.told())
    assert (await auth.call(ada, "SuspendUser", pb.ChangeRequest(id=bob.id))).version == 2
    assert len(await auth.told()) == told
    assert (await auth.call(ada, "ReinstateUser", pb.ChangeRequest(id=bob.id, if_version=2))).status == "active"
    assert (await auth.call(ada, "ReinstateUser", pb.ChangeRequest(id=bob.id))).version == 3
    await auth.call(key, "ListProjects", pb.ListRequest())
    async with refused(ErrorKind.INVALID_TOKEN):
        await auth.call(bob, "ListProjects", pb.ListRequest())
    assert [row.action for row in await auth.audited(acme)] == ["suspend_user", "reinstate_user"]


async def test_a_reset_takes_password_and_second_factor_and_gives_a_token(auth: Installation) -> None:
    ada = await owner(auth)
    bob = await auth.add_person(ada.organisation_id, roles={"": "viewer"})
    first = await auth.call(ada, "ResetUser", pb.ChangeRequest(id=bob.id))
    second = await auth.call(ada, "ResetUser", pb.ChangeRequest(id=bob.id))
    assert (second.user.status, second.user.mfa_enabled) == ("invited", False)
    assert second.token.startswith("hft_") and second.token != first.token
    assert len(await auth.rows(one_time_tokens, used_at=None)) == 1
    assert (await auth.rows(accounts, id=bob.id))[0].password_hash is None
    async with refused(ErrorKind.INVALID_TOKEN):
        await auth.call(bob, "GetOrganisation", pb.GetRequest(id=ada.organisation_id))
    assert (CHANGE_KIND_OWNER, bob.id, "") in await auth.told()


async def test_an_account_that_administers_another_organisation_is_not_its_homes_to_take(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)
    operator = await auth.add_person(ada.organisation_id, roles={"": "owner"}, operator=True)
    bob = await auth.add_person(ada.organisation_id, roles={"": "viewer"}, email="bob@example.com")
    project = await auth.add_project(eve.organisation_id)
    await auth.add_membership(bob.id, eve.organisation_id, "admin", project)
    takeovers = (
        ("ResetUser", pb.ChangeRequest(id=bob.id)),
        ("UpdateUser", pb.UpdateUserRequest(id=bob.id, email="mine@example.com")),
    )
    for rpc, request in takeovers:
        async with refused(ErrorKind.CONFLICT):
            await auth.call(ada, rpc, request)
    # The name, and how the e-mail is written, are no way in.
    await auth.call(ada, "UpdateUser", pb.UpdateUserRequest(id=bob.id, name="Bob", email="Bob@example.com"))
    assert await auth.audited(eve.organisation_id) == []
    for rpc, request in takeovers:
        await auth.call(operator, rpc, request)
    # Who administers both may change their own e-mail.
    await auth.add_membership(ada.id, eve.organisation_id, "admin")
    await auth.call(ada, "UpdateUser", pb.UpdateUserRequest(id=ada.id, email="new@example.com"))


async def test_a_new_way_into_an_account_is_told_to_all_its_organisations(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)
    bob = await auth.add_person(ada.organisation_id, roles={"": "developer"}, email="bob@example.com")
    await auth.add_membership(bob.id, eve.organisation_id, "developer")
    await auth.call(ada, "UpdateUser", pb.UpdateUserRequest(id=bob.id, email="mine@example.com"))
    await auth.call(ada, "ResetUser", pb.ChangeRequest(id=bob.id))
    update, reset = await auth.audited(eve.organisation_id)
    assert (update.action, update.actor_id, update.target_id) == ("update_user", ada.id, bob.id)
    assert update.after == '{"email":"mine@example.com","mfa_enabled":false,"status":"active"}'
    assert (reset.action, reset.actor_id, reset.target_id) == ("reset_user", ada.id, bob.id)
    assert '"status":"invited"' in reset.after


@pytest.mark.parametrize("limited", ["models", "networks", "expires_at"])
async def test_a_restricted_key_lets_nobody_in(auth: Installation, limited: str) -> None:
    ada = await owner(auth)
    acme = ada.organisation_id
    project = await auth.add_project(acme)
    bob = await auth.add_person(acme, roles={"": "viewer"})
    program = await auth.call(ada, "CreateServiceAccount", pb.CreateServiceAccountRequest(name="CI", role="viewer"))
    role = await auth.call(ada, "CreateRole", pb.CreateRoleRequest(name="reader"))
    key = pb.CreateKeyRequest(name="k", project_id=project, owner_id=ada.id, scopes=sorted(ROLES["owner"]))
    free = await auth.call(ada, "CreateKey", key)
    limits: dict[str, Any] = {"models": ["smollm2"], "networks": ["192.0.2.0/24"], "expires_at": auth.now + 60}
    key.MergeFrom(pb.CreateKeyRequest(**{limited: limits[limited]}))
    restricted = await auth.call(ada, "CreateKey", key)
    for rpc, request in (
        ("CreateUser", pb.CreateUserRequest(email="b@example.com", name="Bob")),
        ("InviteUser", pb.InviteUserRequest(email="c@example.com", role="viewer")),
        ("ResetUser", pb.ChangeRequest(id=bob.id)),
        ("UpdateUser", pb.UpdateUserRequest(id=bob.id, email="d@example.com")),
        ("SetMember", pb.SetMemberRequest(user_id=bob.id, role="admin")),
        ("CreateServiceAccount", pb.CreateServiceAccountRequest(name="New", role="viewer")),
        ("UpdateServiceAccount", pb.UpdateServiceAccountRequest(id=program.id, role="admin")),
        ("UpdateRole", pb.UpdateRoleRequest(id=role.id, permissions=pb.StringList(values=["keys:read"]))),
    ):
        with pytest.raises(HelixError, match="restricted") as caught:
            await auth.call(restricted.secret, rpc, request, address="192.0.2.7")
        assert caught.value.kind is ErrorKind.PERMISSION_DENIED
        await auth.call(free.secret, rpc, request)


async def test_a_deleted_user_is_not_invited_under_another_spelling(auth: Installation) -> None:
    ada = await owner(auth)
    project = await auth.add_project(ada.organisation_id)
    bob = await auth.add_person(ada.organisation_id, roles={"": "viewer"}, email="bob@example.com")
    request = pb.InviteUserRequest(email="BOB@example.com", role="viewer", project_id=project)
    await auth.call(ada, "InviteUser", request)
    await auth.call(ada, "DeleteUser", pb.DeleteRequest(id=bob.id))
    assert await auth.rows(one_time_tokens) == []


async def test_a_deleted_user_is_forgotten_but_for_the_id(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)
    acme = ada.organisation_id
    project = await auth.add_project(eve.organisation_id)
    bob = await auth.add_person(acme, roles={"": "developer"}, email="bob@example.com")
    await auth.add_membership(bob.id, eve.organisation_id, "developer")
    _, key = await auth.add_key(eve.organisation_id, project, scopes=["projects:read"], owner_id=bob.id)
    invite = pb.InviteUserRequest(email=bob.email, role="viewer", project_id=await auth.add_project(acme))
    await auth.call(ada, "InviteUser", invite)
    await auth.call(ada, "DeleteUser", pb.DeleteRequest(id=bob.id))
    (row,) = await auth.rows(accounts, id=bob.id)
    assert (row.email, row.email_key, row.name, row.password_hash, row.totp_secret) == (None, None, "", None, None)
    for table in (memberships, recovery_codes):
        assert await auth.rows(table, account_id=bob.id) == []
    assert await auth.rows(one_time_tokens) == []
    assert await auth.rows(api_keys, revoked_at=None) == []
    async with refused(ErrorKind.INVALID_API_KEY):
        await auth.call(key, "ListProjects", pb.ListRequest())
    async with refused(ErrorKind.NOT_FOUND, "id"):
        await auth.call(ada, "GetUser", pb.GetRequest(id=bob.id))
    (record,) = await auth.audited(acme, action="delete_user")
    assert (record.target_id, "developer" in record.before, "bob" in record.before) == (bob.id, True, False)
    # The e-mail is free again.
    await auth.call(ada, "CreateUser", pb.CreateUserRequest(email="bob@example.com", name="Bob"))


async def test_sessions_are_shown_and_ended_in_this_organisation_only(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)
    bob = await auth.add_person(ada.organisation_id, roles={"": "viewer"})
    await auth.add_membership(bob.id, eve.organisation_id, "viewer")
    elsewhere = Person(bob.id, bob.email, eve.organisation_id, await auth.sign_in(bob.id, eve.organisation_id))
    listed = await auth.call(ada, "ListUserSessions", pb.ListUserSessionsRequest(user_id=bob.id))
    assert [session.organisation_id for session in listed.sessions] == [ada.organisation_id]
    ended = await auth.call(ada, "EndUserSessions", pb.EndUserSessionsRequest(user_id=bob.id))
    assert ended.ended == 1
    async with refused(ErrorKind.INVALID_TOKEN):
        await auth.call(bob, "GetOrganisation", pb.GetRequest(id=ada.organisation_id))
    await auth.call(elsewhere, "GetOrganisation", pb.GetRequest(id=eve.organisation_id))
