import asyncio

import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_OWNER
from helixflow.storage.schema import memberships, sessions
from tests.harness.auth import Installation, Person, refused


async def owner(auth: Installation) -> Person:
    return await auth.add_person(await auth.add_organisation(), roles={"": "owner"})


async def test_a_role_is_given_changed_and_taken_and_gateways_are_told(auth: Installation) -> None:
    ada = await owner(auth)
    acme = ada.organisation_id
    project = await auth.add_project(acme)
    bob = await auth.add_person(acme, email="b@example.com")
    given = await auth.call(ada, "SetMember", pb.SetMemberRequest(user_id=bob.id, project_id=project, role="viewer"))
    assert (given.user_id, given.email, given.project_id, given.role) == (bob.id, "b@example.com", project, "viewer")
    change = pb.SetMemberRequest(user_id=bob.id, project_id=project, role="developer", if_version=1)
    assert (await auth.call(ada, "SetMember", change)).version == 2
    change.if_version = 0
    assert (await auth.call(ada, "SetMember", change)).version == 2
    listed = await auth.call(bob, "ListMembers", pb.ListMembersRequest(project_id=project))
    assert [(member.user_id, member.role) for member in listed.members] == [(bob.id, "developer")]
    await auth.call(ada, "RemoveMember", pb.RemoveMemberRequest(user_id=bob.id, project_id=project, if_version=2))
    async with refused(ErrorKind.INVALID_TOKEN):
        await auth.call(bob, "ListMembers", pb.ListMembersRequest(project_id=project))
    async with refused(ErrorKind.NOT_FOUND, "user_id"):
        await auth.call(ada, "RemoveMember", pb.RemoveMemberRequest(user_id=bob.id, project_id=project))
    assert [told for told in await auth.told() if told[0] == CHANGE_KIND_OWNER] == 3 * [
        (CHANGE_KIND_OWNER, bob.id, acme)
    ]
    assert [(row.action, row.target_id) for row in await auth.audited(acme, outcome="done")] == [
        ("set_member", bob.id),
        ("set_member", bob.id),
        ("remove_member", bob.id),
    ]
    # Nothing is left for them here: their sessions ended as well.
    assert await auth.rows(sessions, account_id=bob.id, ended_at=None) == []


async def test_other_roles_and_sessions_stay(auth: Installation) -> None:
    ada = await owner(auth)
    project = await auth.add_project(ada.organisation_id)
    bob = await auth.add_person(ada.organisation_id, roles={"": "viewer", project: "viewer"})
    await auth.call(ada, "RemoveMember", pb.RemoveMemberRequest(user_id=bob.id))
    assert [row.project_id for row in await auth.rows(memberships, account_id=bob.id)] == [project]
    await auth.call(bob, "GetProject", pb.GetRequest(id=project))


async def test_the_keys_of_who_leaves_do_not_come_back_with_them(auth: Installation) -> None:
    ada = await owner(auth)
    acme, other = ada.organisation_id, await auth.add_organisation("Other")
    project, elsewhere = await auth.add_project(acme), await auth.add_project(other)
    bob = await auth.add_person(acme, roles={"": "viewer", project: "developer"})
    await auth.add_membership(bob.id, other, "viewer")
    _, key = await auth.add_key(acme, project, scopes=["projects:read"], owner_id=bob.id)
    _, kept = await auth.add_key(other, elsewhere, scopes=["projects:read"], owner_id=bob.id)
    await auth.call(ada, "RemoveMember", pb.RemoveMemberRequest(user_id=bob.id))
    # They still have a role in the project.
    await auth.call(key, "ListProjects", pb.ListRequest())
    await auth.call(ada, "RemoveMember", pb.RemoveMemberRequest(user_id=bob.id, project_id=project))
    assert (await auth.audited(acme))[-1].before == f'{{"keys":1,"project_id":"{project}","role":"developer"}}'
    await auth.call(ada, "SetMember", pb.SetMemberRequest(user_id=bob.id, role="viewer"))
    async with refused(ErrorKind.INVALID_API_KEY):
        await auth.call(key, "ListProjects", pb.ListRequest())
    await auth.call(kept, "ListProjects", pb.ListRequest())


async def test_versions_count(auth: Installation) -> None:
    ada = await owner(auth)
    bob = await auth.add_person(ada.organisation_id, roles={"": "viewer"})
    eve = await auth.add_person(ada.organisation_id)
    for rpc, request in (
        ("SetMember", pb.SetMemberRequest(user_id=bob.id, role="admin", if_version=7)),
        ("SetMember", pb.SetMemberRequest(user_id=eve.id, role="admin", if_version=1)),
        ("RemoveMember", pb.RemoveMemberRequest(user_id=bob.id, if_version=7)),
    ):
        async with refused(ErrorKind.PRECONDITION_FAILED):
            await auth.call(ada, rpc, request)


async def test_nobody_gives_a_role_that_allows_more_than_they_may_there(auth: Installation) -> None:
    ada = await owner(auth)
    acme = ada.organisation_id
    project = await auth.add_project(acme)
    admin = await auth.add_person(acme, roles={"": "admin"})
    project_admin = await auth.add_person(acme, roles={project: "admin"})
    bob = await auth.add_person(acme)
    for caller, place, role in (
        (admin, "", "owner"),
        (admin, project, "owner"),
        (project_admin, project, "owner"),
        (project_admin, "", "viewer"),
    ):
        async with refused(ErrorKind.PERMISSION_DENIED):
            await auth.call(caller, "SetMember", pb.SetMemberRequest(user_id=bob.id, project_id=place, role=role))
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(admin, "SetMember", pb.SetMemberRequest(user_id=admin.id, role="owner"))
    await auth.call(project_admin, "SetMember", pb.SetMemberRequest(user_id=bob.id, project_id=project, role="admin"))
    async with refused(ErrorKind.UNPROCESSABLE, "role"):
        await auth.call(ada, "SetMember", pb.SetMemberRequest(user_id=bob.id, role="king"))


async def test_a_role_of_ones_own_organisation_counts_and_that_of_another_does_not(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)
    await auth.call(eve, "CreateRole", pb.CreateRoleRequest(name="reader", permissions=["projects:read"]))
    bob = await auth.add_person(ada.organisation_id)
    request = pb.SetMemberRequest(user_id=bob.id, role="reader")
    async with refused(ErrorKind.UNPROCESSABLE, "role"):
        await auth.call(ada, "SetMember", request)
    await auth.call(ada, "CreateRole", pb.CreateRoleRequest(name="reader", permissions=["users:read"]))
    await auth.call(ada, "SetMember", request)
    await auth.call(bob, "ListUsers", pb.ListUsersRequest())
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(bob, "ListProjects", pb.ListRequest())


async def test_nobody_changes_or_removes_who_holds_more_there(auth: Installation) -> None:
    ada = await owner(auth)
    acme = ada.organisation_id
    project = await auth.add_project(acme)
    second = await auth.add_person(acme, roles={"": "owner"})
    admin = await auth.add_person(acme, roles={"": "admin"})
    project_admin = await auth.add_person(acme, roles={project: "admin"})
    project_owner = await auth.add_person(acme, roles={project: "owner"})
    for caller, target, place in (
        (admin, second, ""),
        (admin, second, project),
        (project_admin, project_owner, project),
        (project_admin, ada, project),
    ):
        async with refused(ErrorKind.PERMISSION_DENIED):
            request = pb.SetMemberRequest(user_id=target.id, project_id=place, role="viewer")
            await auth.call(caller, "SetMember", request)
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(admin, "RemoveMember", pb.RemoveMemberRequest(user_id=ada.id))
    await auth.call(ada, "RemoveMember", pb.RemoveMemberRequest(user_id=second.id))


async def test_users_and_projects_of_another_organisation_are_not_there(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)
    theirs = await auth.add_project(eve.organisation_id)
    for rpc, request, param in (
        ("SetMember", pb.SetMemberRequest(user_id=eve.id, role="viewer"), "user_id"),
        ("RemoveMember", pb.RemoveMemberRequest(user_id=eve.id), "user_id"),
        ("SetMember", pb.SetMemberRequest(user_id=ada.id, project_id=theirs, role="viewer"), "project_id"),
        ("RemoveMember", pb.RemoveMemberRequest(user_id=eve.id, project_id=theirs), "project_id"),
        ("ListMembers", pb.ListMembersRequest(project_id=theirs), "project_id"),
    ):
        async with refused(ErrorKind.NOT_FOUND, param):
            await auth.call(ada, rpc, request)


LAST_OWNER = (
    ("SetMember", lambda person: pb.SetMemberRequest(user_id=person.id, role="admin")),
    ("RemoveMember", lambda person: pb.RemoveMemberRequest(user_id=person.id)),
    ("SuspendUser", lambda person: pb.ChangeRequest(id=person.id)),
    ("DeleteUser", lambda person: pb.DeleteRequest(id=person.id)),
)


@pytest.mark.parametrize(("rpc", "request_for"), LAST_OWNER, ids=[rpc for rpc, _ in LAST_OWNER])
async def test_an_organisation_keeps_an_owner_who_can_sign_in(
    auth: Installation, rpc: str, request_for: object
) -> None:
    assert callable(request_for)
    ada = await owner(auth)
    acme = ada.organisation_id
    project = await auth.add_project(acme)
    await auth.add_person(acme, roles={"": "owner"}, suspended=True)
    await auth.add_person(acme, roles={project: "owner"})
    invited = await auth.add_person(acme, roles={"": "owner"}, password=False)
    async with refused(ErrorKind.CONFLICT):
        await auth.call(ada, rpc, request_for(ada))
    await auth.call(ada, rpc, request_for(invited))
    await auth.add_person(acme, roles={"": "owner"})
    await auth.call(ada, rpc, request_for(ada))


async def test_an_owner_of_another_organisation_is_not_taken_from_it(auth: Installation) -> None:
    ada = await owner(auth)
    bob = await auth.add_person(ada.organisation_id, roles={"": "viewer"})
    other = await auth.add_organisation()
    await auth.add_membership(bob.id, other, "owner")
    for rpc, request in (
        ("SuspendUser", pb.ChangeRequest(id=bob.id)),
        ("DeleteUser", pb.DeleteRequest(id=bob.id)),
    ):
        async with refused(ErrorKind.CONFLICT):
            await auth.call(ada, rpc, request)
    # Their role at home may still be taken.
    await auth.call(ada, "RemoveMember", pb.RemoveMemberRequest(user_id=bob.id))


@pytest.mark.parametrize("step_down", [True, False], ids=["themselves", "each other"])
async def test_of_two_owners_demoted_at_once_one_stays(auth: Installation, step_down: bool) -> None:
    ada = await owner(auth)
    bob = await auth.add_person(ada.organisation_id, roles={"": "owner"})

    async def demote(caller: Person, target: Person) -> ErrorKind | None:
        try:
            await auth.call(caller, "SetMember", pb.SetMemberRequest(user_id=target.id, role="admin"))
        except HelixError as exc:
            return exc.kind
        return None

    pairs = ((ada, ada), (bob, bob)) if step_down else ((ada, bob), (bob, ada))
    outcomes = await asyncio.gather(*(demote(caller, target) for caller, target in pairs))
    # Who was demoted by the other one in that moment may not do so any more.
    expected = ErrorKind.CONFLICT if step_down else ErrorKind.PERMISSION_DENIED
    assert sorted(outcomes, key=str) == [expected, None]
    assert len(await auth.rows(memberships, organisation_id=ada.organisation_id, role="owner")) == 1
