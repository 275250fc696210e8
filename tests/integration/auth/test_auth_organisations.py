from helixflow.auth.organisations import DEFAULT_ORGANISATION_ID, ensure_defaults
from helixflow.auth.projects import DEFAULT_PROJECT_ID
from helixflow.core.errors import ErrorKind
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_ORGANISATION
from helixflow.storage.schema import accounts, api_keys, memberships, organisations, projects, sessions
from tests.harness.auth import Installation, refused


async def test_defaults_are_made_once_and_cannot_be_deleted(auth: Installation) -> None:
    await ensure_defaults(auth.database, auth.now)
    await ensure_defaults(auth.database, auth.now)
    assert [row.id for row in await auth.rows(organisations)] == [DEFAULT_ORGANISATION_ID]
    assert [row.id for row in await auth.rows(projects)] == [DEFAULT_PROJECT_ID]
    _, bootstrap = await auth.add_key(DEFAULT_ORGANISATION_ID, DEFAULT_PROJECT_ID, bootstrap=True)
    async with refused(ErrorKind.CONFLICT):
        await auth.call(bootstrap, "DeleteOrganisation", pb.DeleteRequest(id=DEFAULT_ORGANISATION_ID))
    async with refused(ErrorKind.CONFLICT):
        await auth.call(bootstrap, "DeleteProject", pb.DeleteRequest(id=DEFAULT_PROJECT_ID))


async def test_operators_make_organisations_with_a_project_and_an_invitation(auth: Installation) -> None:
    operator = await auth.add_person(await auth.add_organisation(), operator=True, roles={"": "viewer"})
    request = pb.CreateOrganisationRequest(name="New", owner_email="o@example.com")
    made = await auth.call(operator, "CreateOrganisation", request)
    new = made.organisation
    assert (new.name, new.version, new.audit_retention_days) == ("New", 1, 0)
    assert (made.invitation.email, made.invitation.role, made.invitation.project_id) == ("o@example.com", "owner", "")
    assert made.invitation_token.startswith("hft_")
    assert [row.name for row in await auth.rows(projects, organisation_id=new.id)] == ["Default"]
    for chain in ("", new.id):
        (record,) = await auth.audited(chain)
        assert (record.action, record.target_id, record.actor_id) == ("create_organisation", new.id, operator.id)
    # Only its members see it.
    async with refused(ErrorKind.NOT_FOUND, "id"):
        await auth.call(operator, "GetOrganisation", pb.GetRequest(id=new.id))
    ada = await auth.add_person(new.id, roles={"": "owner"})
    assert await auth.call(ada, "GetOrganisation", pb.GetRequest(id=new.id)) == new


async def test_only_operators_make_and_list_them_and_refusals_go_to_the_installation(auth: Installation) -> None:
    ada = await auth.add_person(await auth.add_organisation(), roles={"": "owner"})
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(ada, "CreateOrganisation", pb.CreateOrganisationRequest(name="N", owner_email="o@x.org"))
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(ada, "ListOrganisations", pb.ListRequest())
    assert [(row.action, row.outcome) for row in await auth.audited("")] == [
        ("create_organisation", "denied"),
        ("list_organisations", "denied"),
    ]


async def test_the_list_goes_by_name_page_by_page(auth: Installation) -> None:
    names = ["Zeta", "alpha", "Beta", "Beta", "𝔘" * 100]
    ids = {await auth.add_organisation(name): name for name in names}
    operator = await auth.add_person(next(iter(ids)), operator=True, roles={"": "viewer"})
    seen: list[str] = []
    cursor = ""
    while not seen or cursor:
        page = await auth.call(operator, "ListOrganisations", pb.ListRequest(page_size=1, cursor=cursor))
        seen += [organisation.id for organisation in page.organisations]
        cursor = page.next_cursor
    assert sorted(seen) == sorted(ids)
    assert [ids[organisation_id] for organisation_id in seen] == sorted(names)


async def test_an_organisation_whose_owner_is_lost_gets_another_one(auth: Installation) -> None:
    acme, other = await auth.add_organisation("Acme"), await auth.add_organisation("Other")
    operator = await auth.add_person(acme, operator=True, roles={"": "viewer"})
    lost = await auth.add_person(other, roles={"": "owner"}, password=False)
    request = pb.InviteOwnerRequest(organisation_id=other, owner_email="o@example.com")
    made = await auth.call(operator, "InviteOwner", request, idempotency_key="once")
    assert (made.invitation.email, made.invitation.role, made.invitation.project_id) == ("o@example.com", "owner", "")
    assert made.token.startswith("hft_")
    assert await auth.call(operator, "InviteOwner", request, idempotency_key="once") == made
    for chain in ("", other):
        (record,) = await auth.audited(chain)
        assert (record.action, record.target_id) == ("invite_owner", made.invitation.id)
        assert (record.actor_id, made.token in record.after, other in record.after) == (operator.id, False, True)
    for param, kind, wrong in (
        ("organisation_id", ErrorKind.NOT_FOUND, pb.InviteOwnerRequest(organisation_id="org_x", owner_email="o@x.org")),
        ("owner_email", ErrorKind.UNPROCESSABLE, pb.InviteOwnerRequest(organisation_id=other, owner_email="o")),
        ("owner_email", ErrorKind.CONFLICT, pb.InviteOwnerRequest(organisation_id=other, owner_email=lost.email)),
    ):
        async with refused(kind, param):
            await auth.call(operator, "InviteOwner", wrong)
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(await auth.add_person(other, roles={"": "owner"}), "InviteOwner", request)


async def test_bad_input_is_refused(auth: Installation) -> None:
    acme = await auth.add_organisation()
    operator = await auth.add_person(acme, operator=True, roles={"": "owner"})
    for param, request in (
        ("name", pb.CreateOrganisationRequest(name="", owner_email="o@example.com")),
        ("owner_email", pb.CreateOrganisationRequest(name="New", owner_email="nobody")),
    ):
        async with refused(ErrorKind.UNPROCESSABLE, param):
            await auth.call(operator, "CreateOrganisation", request)
    for days in (-1, 1, 29, 3651):
        async with refused(ErrorKind.UNPROCESSABLE, "audit_retention_days"):
            request = pb.UpdateOrganisationRequest(id=acme, audit_retention_days=days)
            await auth.call(operator, "UpdateOrganisation", request)


async def test_an_update_changes_name_and_retention_and_is_recorded(auth: Installation) -> None:
    acme = await auth.add_organisation("Acme")
    ada = await auth.add_person(acme, roles={"": "owner"})
    request = pb.UpdateOrganisationRequest(id=acme, if_version=1, name="ACME", audit_retention_days=30)
    updated = await auth.call(ada, "UpdateOrganisation", request)
    assert (updated.name, updated.audit_retention_days, updated.version) == ("ACME", 30, 2)
    async with refused(ErrorKind.PRECONDITION_FAILED):
        await auth.call(ada, "UpdateOrganisation", request)
    request.if_version = 0
    assert (await auth.call(ada, "UpdateOrganisation", request)).version == 2
    (record,) = await auth.audited(acme)
    assert (record.before, record.after) == (
        '{"audit_retention_days":0,"name":"Acme"}',
        '{"audit_retention_days":30,"name":"ACME"}',
    )


async def test_a_deleted_organisation_ends_with_all_that_is_in_it(auth: Installation) -> None:
    acme, other = await auth.add_organisation("Acme"), await auth.add_organisation("Other")
    project = await auth.add_project(acme)
    ada = await auth.add_person(acme, roles={"": "owner"}, email="ada@example.com")
    bob = await auth.add_person(acme, roles={"": "viewer"}, email="bob@example.com")
    guest = await auth.add_person(acme, roles={project: "viewer"}, home=other)
    await auth.add_membership(bob.id, other, "viewer")
    elsewhere = await auth.sign_in(bob.id, other)
    _, key = await auth.add_key(acme, project, scopes=["projects:read"])
    await auth.call(ada, "InviteUser", pb.InviteUserRequest(email="c@example.com", role="viewer"))
    await auth.call(ada, "DeleteOrganisation", pb.DeleteRequest(id=acme, if_version=1))
    for caller in (ada, bob, guest):
        async with refused(ErrorKind.INVALID_TOKEN):
            await auth.call(caller, "ListProjects", pb.ListRequest())
    async with refused(ErrorKind.INVALID_API_KEY):
        await auth.call(key, "ListProjects", pb.ListRequest())
    await auth.call(elsewhere, "GetOrganisation", pb.GetRequest(id=other))
    assert await auth.told() == [(CHANGE_KIND_ORGANISATION, acme, acme)]
    assert {row.end_reason for row in await auth.rows(sessions, organisation_id=acme)} == {"deleted"}
    assert await auth.rows(memberships, organisation_id=acme) == []
    assert await auth.rows(api_keys, organisation_id=acme, revoked_at=None) == []
    assert await auth.rows(projects, organisation_id=acme, deleted_at=None) == []
    # Who is a member elsewhere goes on; the others are forgotten.
    emails = {row.id: row.email for row in await auth.rows(accounts)}
    assert emails == {ada.id: None, bob.id: "bob@example.com", guest.id: guest.email}
    for chain in ("", acme):
        assert (await auth.audited(chain))[-1].action == "delete_organisation"


async def test_an_operator_at_home_there_is_deleted_only_by_operators(auth: Installation) -> None:
    acme = await auth.add_organisation()
    ada = await auth.add_person(acme, roles={"": "owner"})
    operator = await auth.add_person(acme, roles={"": "owner"}, operator=True)
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(ada, "DeleteOrganisation", pb.DeleteRequest(id=acme))
    await auth.call(operator, "DeleteOrganisation", pb.DeleteRequest(id=acme))


async def test_another_organisation_is_not_there(auth: Installation) -> None:
    acme, other = await auth.add_organisation(), await auth.add_organisation()
    ada = await auth.add_person(acme, roles={"": "owner"}, operator=True)
    for rpc, request in (
        ("GetOrganisation", pb.GetRequest(id=other)),
        ("GetOrganisation", pb.GetRequest()),
        ("UpdateOrganisation", pb.UpdateOrganisationRequest(id=other, name="Mine")),
        ("DeleteOrganisation", pb.DeleteRequest(id=other)),
    ):
        async with refused(ErrorKind.NOT_FOUND, "id"):
            await auth.call(ada, rpc, request)
