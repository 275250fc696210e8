import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_OWNER
from helixflow.storage.schema import api_keys
from tests.harness.auth import Installation, Person, refused


async def create(auth: Installation, caller: Person, role: str, project_id: str = "") -> pb.ServiceAccount:
    request = pb.CreateServiceAccountRequest(name="robot", project_id=project_id, role=role)
    made: pb.ServiceAccount = await auth.call(caller, "CreateServiceAccount", request)
    return made


async def key_of(auth: Installation, caller: Person, account: pb.ServiceAccount, project_id: str) -> str:
    request = pb.CreateKeyRequest(name="k", project_id=project_id, owner_id=account.id, scopes=["keys:read"])
    return str((await auth.call(caller, "CreateKey", request)).secret)


async def test_a_service_account_is_made_shown_renamed_and_deleted(auth: Installation) -> None:
    acme = await auth.add_organisation()
    search, chat = await auth.add_project(acme), await auth.add_project(acme, "Chat")
    ada = await auth.add_person(acme, roles={"": "owner"})
    bob = await auth.add_person(acme, roles={search: "developer"})
    everywhere = await create(auth, ada, "viewer")
    auth.clock.advance(1)
    here = await create(auth, bob, "developer", search)
    assert (here.name, here.project_id, here.role, here.suspended, here.version) == (
        "robot",
        search,
        "developer",
        False,
        1,
    )
    assert await auth.call(bob, "GetServiceAccount", pb.GetRequest(id=here.id)) == here

    async def listed(caller: Person, project_id: str = "") -> list[str]:
        request = pb.ListInProjectRequest(project_id=project_id)
        return [one.id for one in (await auth.call(caller, "ListServiceAccounts", request)).service_accounts]

    assert await listed(ada) == [here.id, everywhere.id]
    assert await listed(ada, chat) == []
    assert await listed(bob) == await listed(ada, search) == [here.id]

    request = pb.UpdateServiceAccountRequest(id=here.id, if_version=1, name="crawler")
    renamed = await auth.call(bob, "UpdateServiceAccount", request)
    assert (renamed.name, renamed.version) == ("crawler", 2)
    assert await auth.told() == []
    async with refused(ErrorKind.PRECONDITION_FAILED):
        await auth.call(bob, "UpdateServiceAccount", request)

    secret = await key_of(auth, ada, here, search)
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(bob, "DeleteServiceAccount", pb.DeleteRequest(id=here.id))
    await auth.call(ada, "DeleteServiceAccount", pb.DeleteRequest(id=here.id, if_version=2))
    assert await auth.told() == [(CHANGE_KIND_OWNER, here.id, acme)]
    assert [row.revoked_at for row in await auth.rows(api_keys)] == [auth.now]
    async with refused(ErrorKind.INVALID_API_KEY):
        await auth.call(secret, "ListKeys", pb.ListInProjectRequest())
    async with refused(ErrorKind.NOT_FOUND, "id"):
        await auth.call(ada, "GetServiceAccount", pb.GetRequest(id=here.id))
    async with refused(ErrorKind.UNPROCESSABLE, "owner_id"):
        await key_of(auth, ada, here, search)
    actions = [row.action for row in await auth.audited(acme, target_kind="service_account", outcome="done")]
    assert actions == [
        "create_service_account",
        "create_service_account",
        "update_service_account",
        "delete_service_account",
    ]


async def test_its_keys_rest_while_it_is_suspended_and_follow_its_role(auth: Installation) -> None:
    acme = await auth.add_organisation()
    search = await auth.add_project(acme)
    ada = await auth.add_person(acme, roles={"": "owner"})
    account = await create(auth, ada, "developer")
    secret = await key_of(auth, ada, account, search)

    async def update(**fields: object) -> pb.ServiceAccount:
        request = pb.UpdateServiceAccountRequest(id=account.id, **fields)  # type: ignore[arg-type]
        answer: pb.ServiceAccount = await auth.call(ada, "UpdateServiceAccount", request)
        return answer

    assert (await update(suspended=True)).suspended
    await update(suspended=True)
    async with refused(ErrorKind.INVALID_API_KEY):
        await auth.call(secret, "ListKeys", pb.ListInProjectRequest())
    assert not (await update(suspended=False)).suspended
    await auth.call(secret, "ListKeys", pb.ListInProjectRequest())
    await update(role="billing")
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(secret, "ListKeys", pb.ListInProjectRequest())
    assert await auth.told() == [(CHANGE_KIND_OWNER, account.id, acme)] * 3


async def test_nobody_gives_it_or_takes_over_what_they_may_not_do_themselves(auth: Installation) -> None:
    acme = await auth.add_organisation()
    search, chat = await auth.add_project(acme), await auth.add_project(acme, "Chat")
    ada = await auth.add_person(acme, roles={"": "owner"})
    bob = await auth.add_person(acme, roles={search: "developer"})
    for role, project_id in (("admin", search), ("owner", search), ("developer", ""), ("developer", chat)):
        async with refused(ErrorKind.PERMISSION_DENIED):
            await create(auth, bob, role, project_id)
    async with refused(ErrorKind.UNPROCESSABLE, "role"):
        await create(auth, ada, "emperor")
    async with refused(ErrorKind.UNPROCESSABLE, "name"):
        await auth.call(ada, "CreateServiceAccount", pb.CreateServiceAccountRequest(name="", role="viewer"))
    strong = await create(auth, ada, "owner", search)
    weak = await create(auth, ada, "viewer", search)
    for request in (
        pb.UpdateServiceAccountRequest(id=strong.id, role="developer"),
        pb.UpdateServiceAccountRequest(id=strong.id, suspended=True),
        pb.UpdateServiceAccountRequest(id=weak.id, role="admin"),
    ):
        async with refused(ErrorKind.PERMISSION_DENIED):
            await auth.call(bob, "UpdateServiceAccount", request)


async def test_other_organisations_have_no_such_service_accounts(auth: Installation) -> None:
    acme, other = await auth.add_organisation(), await auth.add_organisation("Other")
    theirs = await auth.add_project(other, "Theirs")
    ada, eve = await auth.add_person(acme, roles={"": "owner"}), await auth.add_person(other, roles={"": "owner"})
    account = await create(auth, ada, "viewer")
    with pytest.raises(HelixError) as caught:
        await create(auth, ada, "viewer", theirs)
    assert caught.value.kind is ErrorKind.NOT_FOUND
    for rpc, request in (
        ("GetServiceAccount", pb.GetRequest(id=account.id)),
        ("UpdateServiceAccount", pb.UpdateServiceAccountRequest(id=account.id, name="mine")),
        ("DeleteServiceAccount", pb.DeleteRequest(id=account.id)),
    ):
        async with refused(ErrorKind.NOT_FOUND, "id"):
            await auth.call(eve, rpc, request)
    async with refused(ErrorKind.UNPROCESSABLE, "owner_id"):
        await auth.call(eve, "CreateKey", pb.CreateKeyRequest(name="k", project_id=theirs, owner_id=account.id))
