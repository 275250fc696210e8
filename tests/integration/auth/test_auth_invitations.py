from helixflow.core.errors import ErrorKind
from helixflow.core.keys import hash_key
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.storage.schema import one_time_tokens
from tests.harness.auth import TOKEN_LIFE_S, Installation, Person, refused


async def owner(auth: Installation) -> Person:
    return await auth.add_person(await auth.add_organisation(), roles={"": "owner"})


async def test_an_invitation_is_made_listed_and_revoked(auth: Installation) -> None:
    ada = await owner(auth)
    made = await auth.call(ada, "InviteUser", pb.InviteUserRequest(email="Bob@example.com", role="developer"))
    invitation = made.invitation
    assert (invitation.email, invitation.role, invitation.project_id) == ("Bob@example.com", "developer", "")
    assert (invitation.invited_by, invitation.expires_at) == (ada.id, auth.now + TOKEN_LIFE_S)
    (row,) = await auth.rows(one_time_tokens)
    assert (row.hash, row.purpose, row.account_id) == (hash_key(made.token), "invite", None)
    listed = await auth.call(ada, "ListInvitations", pb.ListRequest())
    assert list(listed.invitations) == [invitation]
    await auth.call(ada, "RevokeInvitation", pb.DeleteRequest(id=invitation.id))
    assert await auth.rows(one_time_tokens) == []
    async with refused(ErrorKind.NOT_FOUND, "id"):
        await auth.call(ada, "RevokeInvitation", pb.DeleteRequest(id=invitation.id))
    records = await auth.audited(ada.organisation_id, outcome="done")
    assert [(record.action, record.target_id) for record in records] == [
        ("invite_user", invitation.id),
        ("revoke_invitation", invitation.id),
    ]
    assert made.token not in records[0].after


async def test_expired_and_used_invitations_are_not_listed(auth: Installation) -> None:
    ada = await owner(auth)
    made = await auth.call(ada, "InviteUser", pb.InviteUserRequest(email="b@example.com", role="viewer"))
    auth.clock.advance(TOKEN_LIFE_S)
    later = await auth.sign_in(ada.id, ada.organisation_id)
    assert not (await auth.call(later, "ListInvitations", pb.ListRequest())).invitations
    async with refused(ErrorKind.NOT_FOUND, "id"):
        await auth.call(later, "RevokeInvitation", pb.DeleteRequest(id=made.invitation.id))


async def test_the_answer_does_not_depend_on_accounts_elsewhere(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)
    at_home = await auth.add_person(ada.organisation_id)
    answers = []
    for email in (eve.email, at_home.email, "nobody@example.com"):
        made = await auth.call(ada, "InviteUser", pb.InviteUserRequest(email=email, role="viewer"))
        made.invitation.id, made.invitation.email, made.token = "", "", ""
        answers.append(made)
    assert answers[0] == answers[1] == answers[2]
    assert [row.account_id for row in await auth.rows(one_time_tokens)] == [None, None, None]


async def test_members_of_the_place_itself_are_not_invited_to_it(auth: Installation) -> None:
    ada = await owner(auth)
    project = await auth.add_project(ada.organisation_id)
    bob = await auth.add_person(ada.organisation_id, roles={"": "viewer"})
    async with refused(ErrorKind.CONFLICT, "email"):
        await auth.call(ada, "InviteUser", pb.InviteUserRequest(email=bob.email.upper(), role="viewer"))
    request = pb.InviteUserRequest(email=bob.email, role="developer", project_id=project)
    await auth.call(ada, "InviteUser", request)


async def test_a_second_invitation_to_the_same_place_ends_the_first(auth: Installation) -> None:
    ada = await owner(auth)
    project = await auth.add_project(ada.organisation_id)
    ids = []
    for place, role, email in (
        ("", "viewer", "b@example.com"),
        (project, "viewer", "b@example.com"),
        ("", "developer", "B@Example.com"),
    ):
        request = pb.InviteUserRequest(email=email, role=role, project_id=place)
        ids.append((await auth.call(ada, "InviteUser", request)).invitation.id)
    listed = (await auth.call(ada, "ListInvitations", pb.ListRequest())).invitations
    assert {invitation.id for invitation in listed} == set(ids[1:])


async def test_nobody_invites_to_more_than_they_may_do_nor_revokes_that(auth: Installation) -> None:
    ada = await owner(auth)
    project = await auth.add_project(ada.organisation_id)
    admin = await auth.add_person(ada.organisation_id, roles={"": "admin"})
    project_admin = await auth.add_person(ada.organisation_id, roles={project: "admin"})
    for caller, role, place in (
        (admin, "owner", ""),
        (admin, "owner", project),
        (project_admin, "owner", project),
        (project_admin, "viewer", ""),
    ):
        async with refused(ErrorKind.PERMISSION_DENIED):
            request = pb.InviteUserRequest(email="b@example.com", role=role, project_id=place)
            await auth.call(caller, "InviteUser", request)
    request = pb.InviteUserRequest(email="b@example.com", role="admin", project_id=project)
    await auth.call(project_admin, "InviteUser", request)
    to_owner = await auth.call(ada, "InviteUser", pb.InviteUserRequest(email="c@example.com", role="owner"))
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(admin, "RevokeInvitation", pb.DeleteRequest(id=to_owner.invitation.id))


async def test_bad_input_is_refused(auth: Installation) -> None:
    ada = await owner(auth)
    for param, request in (
        ("email", pb.InviteUserRequest(email="no", role="viewer")),
        ("email", pb.InviteUserRequest(email="a@b\0", role="viewer")),
        ("role", pb.InviteUserRequest(email="b@example.com")),
        ("role", pb.InviteUserRequest(email="b@example.com", role="king")),
    ):
        async with refused(ErrorKind.UNPROCESSABLE, param):
            await auth.call(ada, "InviteUser", request)


async def test_places_and_invitations_of_another_organisation_are_not_there(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)
    theirs = await auth.add_project(eve.organisation_id)
    made = await auth.call(eve, "InviteUser", pb.InviteUserRequest(email="b@example.com", role="viewer"))
    assert not (await auth.call(ada, "ListInvitations", pb.ListRequest())).invitations
    async with refused(ErrorKind.NOT_FOUND, "id"):
        await auth.call(ada, "RevokeInvitation", pb.DeleteRequest(id=made.invitation.id))
    async with refused(ErrorKind.NOT_FOUND, "project_id"):
        request = pb.InviteUserRequest(email="b@example.com", role="viewer", project_id=theirs)
        await auth.call(ada, "InviteUser", request)


async def test_who_could_not_have_made_an_invitation_does_not_end_it_by_another_one(auth: Installation) -> None:
    ada = await owner(auth)
    admin = await auth.add_person(ada.organisation_id, roles={"": "admin"})
    made = await auth.call(ada, "InviteUser", pb.InviteUserRequest(email="New@example.com", role="owner"))
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(admin, "InviteUser", pb.InviteUserRequest(email="new@example.com", role="viewer"))
    assert [row.id for row in await auth.rows(one_time_tokens)] == [made.invitation.id]
    await auth.call(ada, "InviteUser", pb.InviteUserRequest(email="new@example.com", role="viewer"))
    ended = await auth.audited(ada.organisation_id, action="revoke_invitation")
    assert [(record.target_id, record.outcome) for record in ended] == [(made.invitation.id, "done")]
