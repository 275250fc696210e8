from helixflow.core.errors import ErrorKind
from helixflow.core.permissions import INSTALLATION_PERMISSIONS, ROLES
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_ORGANISATION
from tests.harness.auth import TOKEN_LIFE_S, Installation, Person, refused


async def owner(auth: Installation) -> Person:
    return await auth.add_person(await auth.add_organisation(), roles={"": "owner"})


async def make(auth: Installation, caller: Person, name: str, *permissions: str) -> pb.Role:
    made = await auth.call(caller, "CreateRole", pb.CreateRoleRequest(name=name, permissions=permissions))
    assert isinstance(made, pb.Role)
    return made


async def test_a_role_is_made_read_changed_deleted_and_recorded(auth: Installation) -> None:
    ada = await owner(auth)
    request = pb.CreateRoleRequest(
        name="key-keeper", description="Keeps keys.", permissions=["keys:read", "keys:create", "keys:read"]
    )
    role = await auth.call(ada, "CreateRole", request)
    assert (role.name, role.description, role.permissions) == (
        "key-keeper",
        "Keeps keys.",
        ["keys:create", "keys:read"],
    )
    assert role == await auth.call(ada, "GetRole", pb.GetRequest(id=role.id))
    change = pb.UpdateRoleRequest(id=role.id, if_version=1, permissions=pb.StringList(values=["keys:read"]))
    changed = await auth.call(ada, "UpdateRole", change)
    assert (changed.permissions, changed.description, changed.version) == (["keys:read"], "Keeps keys.", 2)
    # Tokens and cached keys of everybody with the role say otherwise.
    assert await auth.told() == [(CHANGE_KIND_ORGANISATION, ada.organisation_id, ada.organisation_id)]
    described = await auth.call(ada, "UpdateRole", pb.UpdateRoleRequest(id=role.id, description=""))
    assert (described.description, described.version, len(await auth.told())) == ("", 3, 1)
    assert (await auth.call(ada, "UpdateRole", pb.UpdateRoleRequest(id=role.id, description=""))).version == 3
    async with refused(ErrorKind.PRECONDITION_FAILED):
        await auth.call(ada, "DeleteRole", pb.DeleteRequest(id=role.id, if_version=1))
    await auth.call(ada, "DeleteRole", pb.DeleteRequest(id=role.id, if_version=3))
    async with refused(ErrorKind.NOT_FOUND, "id"):
        await auth.call(ada, "GetRole", pb.GetRequest(id=role.id))
    actions = [row.action for row in await auth.audited(ada.organisation_id, outcome="done")]
    assert actions == ["create_role", "update_role", "update_role", "delete_role"]


async def test_a_changed_role_holds_at_once(auth: Installation) -> None:
    ada = await owner(auth)
    role = await make(auth, ada, "reader", "projects:read", "users:read")
    bob = await auth.add_person(ada.organisation_id, roles={"": "reader"})
    await auth.call(bob, "ListUsers", pb.ListUsersRequest())
    narrower = pb.UpdateRoleRequest(id=role.id, permissions=pb.StringList(values=["projects:read"]))
    await auth.call(ada, "UpdateRole", narrower)
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(bob, "ListUsers", pb.ListUsersRequest())


async def test_pages_have_built_in_roles_first_then_own_ones_by_name(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)
    await make(auth, eve, "theirs", "projects:read")
    for name in ("zebra", "ape", "mole"):
        await make(auth, ada, name, "projects:read")
    seen: list[pb.Role] = []
    cursor = ""
    while not seen or cursor:
        page = await auth.call(ada, "ListRoles", pb.ListRequest(page_size=4, cursor=cursor))
        seen += page.roles
        cursor = page.next_cursor
    assert [role.name for role in seen] == [*ROLES, "ape", "mole", "zebra"]
    assert [role.built_in for role in seen] == [True] * len(ROLES) + [False] * 3
    assert [role.id for role in seen[: len(ROLES)]] == list(ROLES)
    assert seen[1] == await auth.call(ada, "GetRole", pb.GetRequest(id="admin"))
    assert set(seen[0].permissions) == {permission.value for permission in ROLES["owner"]}


async def test_bad_names_are_refused(auth: Installation) -> None:
    ada = await owner(auth)
    # The last begins with a Cyrillic letter.
    for name in ("", "Reader", "1st", "-x", "a b", "a" * 51, "ro\0le", "rôle", "reader\n", "оwner"):
        async with refused(ErrorKind.UNPROCESSABLE, "name"):
            await auth.call(ada, "CreateRole", pb.CreateRoleRequest(name=name))


async def test_names_do_not_collide(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)
    await make(auth, ada, "reader")
    await make(auth, eve, "reader")
    for name in ("owner", "reader"):
        async with refused(ErrorKind.CONFLICT, "name"):
            await auth.call(ada, "CreateRole", pb.CreateRoleRequest(name=name))


async def test_permissions_are_known_and_none_of_the_installation(auth: Installation) -> None:
    operator = await auth.add_person(await auth.add_organisation(), roles={"": "owner"}, operator=True)
    for bad in ("projects:*", "PROJECTS:READ", "", *INSTALLATION_PERMISSIONS):
        request = pb.CreateRoleRequest(name="reader", permissions=["projects:read", bad])
        async with refused(ErrorKind.UNPROCESSABLE, "permissions[1]"):
            await auth.call(operator, "CreateRole", request)
    for text in ("x" * 501, "two\nlines"):
        async with refused(ErrorKind.UNPROCESSABLE, "description"):
            await auth.call(operator, "CreateRole", pb.CreateRoleRequest(name="reader", description=text))


async def test_nobody_makes_changes_or_deletes_a_role_beyond_their_own(auth: Installation) -> None:
    ada = await owner(auth)
    admin = await auth.add_person(ada.organisation_id, roles={"": "admin"})
    beyond = await make(auth, ada, "breaker", "organisations:delete")
    within = await make(auth, ada, "reader", "projects:read")
    delete = pb.StringList(values=["organisations:delete"])
    for rpc, request in (
        ("CreateRole", pb.CreateRoleRequest(name="mine", permissions=["organisations:delete"])),
        ("UpdateRole", pb.UpdateRoleRequest(id=within.id, permissions=delete)),
        ("UpdateRole", pb.UpdateRoleRequest(id=beyond.id, permissions=pb.StringList())),
        ("UpdateRole", pb.UpdateRoleRequest(id=beyond.id, description="Harmless.")),
        ("DeleteRole", pb.DeleteRequest(id=beyond.id)),
    ):
        async with refused(ErrorKind.PERMISSION_DENIED):
            await auth.call(admin, rpc, request)
    await auth.call(admin, "DeleteRole", pb.DeleteRequest(id=within.id))


async def test_built_in_roles_stay_as_they_are(auth: Installation) -> None:
    ada = await owner(auth)
    for rpc, request in (
        ("UpdateRole", pb.UpdateRoleRequest(id="viewer", permissions=pb.StringList())),
        ("DeleteRole", pb.DeleteRequest(id="viewer")),
    ):
        async with refused(ErrorKind.CONFLICT, "id"):
            await auth.call(ada, rpc, request)


async def test_a_role_in_use_is_not_deleted(auth: Installation) -> None:
    ada = await owner(auth)
    project = await auth.add_project(ada.organisation_id)
    role = await make(auth, ada, "reader", "projects:read")
    bob = await auth.add_person(ada.organisation_id, roles={project: "reader"})
    delete = pb.DeleteRequest(id=role.id)
    async with refused(ErrorKind.CONFLICT):
        await auth.call(ada, "DeleteRole", delete)
    await auth.call(ada, "RemoveMember", pb.RemoveMemberRequest(user_id=bob.id, project_id=project))
    program = await auth.call(
        ada, "CreateServiceAccount", pb.CreateServiceAccountRequest(name="CI", project_id=project, role="reader")
    )
    async with refused(ErrorKind.CONFLICT):
        await auth.call(ada, "DeleteRole", delete)
    await auth.call(ada, "DeleteServiceAccount", pb.DeleteRequest(id=program.id))
    await auth.call(ada, "InviteUser", pb.InviteUserRequest(email="b@example.com", role="reader"))
    async with refused(ErrorKind.CONFLICT):
        await auth.call(ada, "DeleteRole", delete)
    auth.clock.advance(TOKEN_LIFE_S)
    await auth.call(await auth.sign_in(ada.id, ada.organisation_id), "DeleteRole", delete)


async def test_roles_of_another_organisation_are_not_there(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)
    theirs = await make(auth, eve, "theirs", "projects:read")
    for rpc, request in (
        ("GetRole", pb.GetRequest(id=theirs.id)),
        ("UpdateRole", pb.UpdateRoleRequest(id=theirs.id, description="Mine.")),
        ("DeleteRole", pb.DeleteRequest(id=theirs.id)),
    ):
        async with refused(ErrorKind.NOT_FOUND, "id"):
            await auth.call(ada, rpc, request)
