import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_PROJECT
from helixflow.storage.schema import api_keys, memberships, one_time_tokens, service_accounts
from tests.harness.auth import Installation, refused


async def test_a_project_is_made_read_renamed_and_recorded(auth: Installation) -> None:
    acme = await auth.add_organisation()
    ada = await auth.add_person(acme, roles={"": "owner"})
    made = await auth.call(ada, "CreateProject", pb.CreateProjectRequest(name="Søk '; --"))
    assert (made.name, made.organisation_id, made.version) == ("Søk '; --", acme, 1)
    assert made == await auth.call(ada, "GetProject", pb.GetRequest(id=made.id))
    auth.clock.advance(5)
    renamed = await auth.call(ada, "UpdateProject", pb.UpdateProjectRequest(id=made.id, if_version=1, name="Search"))
    assert (renamed.name, renamed.version, renamed.updated_at) == ("Search", 2, made.updated_at + 5)
    assert [(row.action, row.target_id, row.before, row.after) for row in await auth.audited(acme)] == [
        ("create_project", made.id, "", '{"name":"Søk \'; --"}'),
        ("update_project", made.id, '{"name":"Søk \'; --"}', '{"name":"Search"}'),
    ]


async def test_an_update_needs_the_version_that_is_stored(auth: Installation) -> None:
    acme = await auth.add_organisation()
    project = await auth.add_project(acme)
    ada = await auth.add_person(acme, roles={"": "owner"})
    async with refused(ErrorKind.PRECONDITION_FAILED):
        await auth.call(ada, "UpdateProject", pb.UpdateProjectRequest(id=project, if_version=2, name="New"))
    async with refused(ErrorKind.PRECONDITION_FAILED):
        await auth.call(ada, "DeleteProject", pb.DeleteRequest(id=project, if_version=2))


async def test_an_update_that_changes_nothing_leaves_no_trace(auth: Installation) -> None:
    acme = await auth.add_organisation()
    project = await auth.add_project(acme, "Search")
    ada = await auth.add_person(acme, roles={"": "owner"})
    for request in (pb.UpdateProjectRequest(id=project), pb.UpdateProjectRequest(id=project, name="Search")):
        assert (await auth.call(ada, "UpdateProject", request)).version == 1
    assert await auth.audited(acme) == []


async def test_names_are_unique_in_an_organisation_and_free_again_after_deletion(auth: Installation) -> None:
    acme, other = await auth.add_organisation(), await auth.add_organisation()
    await auth.add_project(other, "Search")
    ada = await auth.add_person(acme, roles={"": "owner"})
    first = await auth.call(ada, "CreateProject", pb.CreateProjectRequest(name="Search"))
    second = await auth.call(ada, "CreateProject", pb.CreateProjectRequest(name="search"))
    async with refused(ErrorKind.CONFLICT, "name"):
        await auth.call(ada, "CreateProject", pb.CreateProjectRequest(name="Search"))
    async with refused(ErrorKind.CONFLICT, "name"):
        await auth.call(ada, "UpdateProject", pb.UpdateProjectRequest(id=second.id, name="Search"))
    await auth.call(ada, "DeleteProject", pb.DeleteRequest(id=first.id))
    await auth.call(ada, "CreateProject", pb.CreateProjectRequest(name="Search"))


async def test_bad_names_are_refused(auth: Installation) -> None:
    ada = await auth.add_person(await auth.add_organisation(), roles={"": "owner"})
    for name in ("", "  ", "x" * 101, "two\nlines", "nul\0", "\u202eright to left"):
        async with refused(ErrorKind.UNPROCESSABLE, "name"):
            await auth.call(ada, "CreateProject", pb.CreateProjectRequest(name=name))


async def test_a_list_has_what_the_caller_may_read_page_by_page(auth: Installation) -> None:
    acme, other = await auth.add_organisation(), await auth.add_organisation()
    await auth.add_project(other)
    ids = []
    for index in range(5):
        # Two in one second: the id decides then.
        auth.clock.advance(index % 2)
        ids.append(await auth.add_project(acme, f"P{index}"))
    ada = await auth.add_person(acme, roles={"": "viewer"})
    bob = await auth.add_person(acme, roles={ids[1]: "developer", ids[3]: "viewer"})
    seen, cursor = [], ""
    while not seen or cursor:
        page = await auth.call(ada, "ListProjects", pb.ListRequest(page_size=2, cursor=cursor))
        seen += [project.id for project in page.projects]
        cursor = page.next_cursor
    assert sorted(seen) == sorted(ids) and seen[0] in ids[3:]
    mine = await auth.call(bob, "ListProjects", pb.ListRequest())
    assert {project.id for project in mine.projects} == {ids[1], ids[3]}


async def test_sizes_and_cursors_that_are_no_good_are_refused(auth: Installation) -> None:
    ada = await auth.add_person(await auth.add_organisation(), roles={"": "viewer"})
    for size in (-1, 101):
        async with refused(ErrorKind.UNPROCESSABLE, "limit"):
            await auth.call(ada, "ListProjects", pb.ListRequest(page_size=size))
    for cursor in ("x", "WyJhIiwiYiJd", "W10", "é"):
        async with refused(ErrorKind.UNPROCESSABLE, "cursor"):
            await auth.call(ada, "ListProjects", pb.ListRequest(cursor=cursor))


async def test_what_belongs_to_another_organisation_is_not_there(auth: Installation) -> None:
    acme, other = await auth.add_organisation(), await auth.add_organisation()
    theirs = await auth.add_project(other)
    ada = await auth.add_person(acme, roles={"": "owner"})
    messages = set()
    for project in (theirs, "proj_" + "0" * 24):
        for rpc, request in (
            ("GetProject", pb.GetRequest(id=project)),
            ("UpdateProject", pb.UpdateProjectRequest(id=project, name="Mine")),
            ("DeleteProject", pb.DeleteRequest(id=project)),
        ):
            with pytest.raises(HelixError) as caught:
                await auth.call(ada, rpc, request)
            messages.add((caught.value.kind, caught.value.message.replace(project, "…")))
    assert messages == {(ErrorKind.NOT_FOUND, "There is no project '…'.")}
    assert {row.reason for row in await auth.audited(acme)} == {"not_found"}


async def test_a_deleted_project_takes_with_it_what_is_of_use_only_there(auth: Installation) -> None:
    acme = await auth.add_organisation()
    doomed, kept = await auth.add_project(acme, "Doomed"), await auth.add_project(acme, "Kept")
    ada = await auth.add_person(acme, roles={"": "owner"})
    bob = await auth.add_person(acme, roles={doomed: "developer", kept: "developer"})
    _, key = await auth.add_key(acme, doomed, scopes=["projects:read"])
    kept_id, _ = await auth.add_key(acme, kept, scopes=["projects:read"])
    program = await auth.call(
        ada, "CreateServiceAccount", pb.CreateServiceAccountRequest(name="CI", project_id=doomed, role="viewer")
    )
    await auth.call(ada, "InviteUser", pb.InviteUserRequest(email="c@example.com", role="viewer", project_id=doomed))
    await auth.call(key, "GetProject", pb.GetRequest(id=doomed))
    await auth.call(ada, "DeleteProject", pb.DeleteRequest(id=doomed))
    async with refused(ErrorKind.INVALID_API_KEY):
        await auth.call(key, "GetProject", pb.GetRequest(id=doomed))
    assert [row.id for row in await auth.rows(api_keys, revoked_at=None)] == [kept_id]
    assert await auth.rows(service_accounts, id=program.id, deleted_at=None) == []
    assert await auth.rows(one_time_tokens, project_id=doomed) == []
    assert [row.project_id for row in await auth.rows(memberships, account_id=bob.id)] == [kept]
    assert await auth.told() == [(CHANGE_KIND_PROJECT, doomed, acme)]
    async with refused(ErrorKind.NOT_FOUND, "id"):
        await auth.call(ada, "GetProject", pb.GetRequest(id=doomed))


async def test_a_repeated_request_makes_one_project(auth: Installation) -> None:
    ada = await auth.add_person(await auth.add_organisation(), roles={"": "owner"})
    request = pb.CreateProjectRequest(name="Once")
    first = await auth.call(ada, "CreateProject", request, idempotency_key="k1")
    assert first == await auth.call(ada, "CreateProject", request, idempotency_key="k1")
    assert len((await auth.call(ada, "ListProjects", pb.ListRequest())).projects) == 1


async def test_a_repeated_request_in_another_organisation_is_another_one(auth: Installation) -> None:
    acme, other = await auth.add_organisation(), await auth.add_organisation()
    ada = await auth.add_person(acme, roles={"": "owner"})
    await auth.add_membership(ada.id, other, "owner")
    request = pb.CreateProjectRequest(name="Once")
    await auth.call(ada, "CreateProject", request, idempotency_key="k1")
    elsewhere = await auth.sign_in(ada.id, other)
    async with refused(ErrorKind.UNPROCESSABLE, "Idempotency-Key"):
        await auth.call(elsewhere, "CreateProject", request, idempotency_key="k1")
