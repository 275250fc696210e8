"""Every RPC of AdminService and UsageService, for every role, at every place: allowed exactly where the declarations
and the table of roles say so.

Each call names things of one organisation and one project in it (`Scene`). All writes are undone, so that each call
begins from the same state.
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest
from google.protobuf.message import Message

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import INSTALLATION_PERMISSIONS, ROLES
from helixflow.rpc.access import Access, Level, declared_access
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.rpc.generated.auth_v1 import configuration_pb2, fleet_pb2, metering_pb2, usage_pb2
from helixflow.storage.engine import Database
from tests.harness.auth import (
    ADMIN_SERVICE,
    CONFIGURATION_SERVICE,
    FLEET_SERVICE,
    USAGE_SERVICE,
    Installation,
    Person,
    Rehearsal,
)
from tests.harness.ledger import NODE, OTHER_JOURNAL, make_row, ship
from tests.harness.recording_pools import RecordingPools

# What decides here is not the database; the tests of the operations themselves run on both kinds.
on_sqlite = pytest.mark.parametrize("database_settings", ["sqlite"], indirect=True)

ACCESS = {
    method.name: access
    for service in (ADMIN_SERVICE, USAGE_SERVICE, FLEET_SERVICE, CONFIGURATION_SERVICE)
    for method, access in declared_access(service)
}
MODEL = "smollm2-135m-instruct"
DOCUMENT = '{"models": [{"name": "new", "deployments": [{"engine": "openai", "base_url": "http://127.0.0.1:9/v1"}]}]}'
# What somebody may do who has no role at all, beside those with one.
NO_ROLE = "no role"
OPERATOR = "operator"
WHO = (*ROLES, NO_ROLE, OPERATOR)


@dataclass(frozen=True, slots=True)
class Scene:
    """What the calls are about."""

    organisation: str
    project: str
    other_project: str
    other_organisation: str
    user: Person
    invitation: str
    role: str
    program: str
    key: str
    limit: str
    budget: str
    price: str
    # In the ledger, of that project.
    request: str


# As little as possible is given or taken, so that only the declared permission decides.
REQUESTS: dict[str, Callable[[Scene], Message]] = {
    "CreateOrganisation": lambda s: pb.CreateOrganisationRequest(name="New", owner_email="o@example.com"),
    "InviteOwner": lambda s: pb.InviteOwnerRequest(organisation_id=s.organisation, owner_email="o@example.com"),
    "GetConfiguration": lambda s: configuration_pb2.GetConfigurationRequest(),
    "PlanConfiguration": lambda s: configuration_pb2.PlanConfigurationRequest(document=DOCUMENT),
    "ApplyConfiguration": lambda s: configuration_pb2.ApplyConfigurationRequest(document=DOCUMENT),
    "RestoreConfiguration": lambda s: configuration_pb2.RestoreConfigurationRequest(revision=1),
    "ListConfigurations": lambda s: configuration_pb2.ListConfigurationsRequest(),
    "ListFollowers": lambda s: configuration_pb2.ListFollowersRequest(),
    "ListPools": lambda s: fleet_pb2.ListPoolsRequest(),
    "LoadModel": lambda s: fleet_pb2.PoolDeploymentRequest(pool="a", deployment="m/x"),
    "UnloadModel": lambda s: fleet_pb2.PoolDeploymentRequest(pool="a", deployment="m/x"),
    "PinModel": lambda s: fleet_pb2.PinPoolModelRequest(pool="a", deployment="m/x", pinned=True),
    "ScaleModel": lambda s: fleet_pb2.ScalePoolModelRequest(pool="a", deployment="m/x", replicas=2),
    "DrainPool": lambda s: fleet_pb2.DrainPoolRequest(pool="a"),
    "SetShares": lambda s: pb.SetSharesRequest(organisation_id=s.organisation, share_weight=200),
    "ListOrganisations": lambda s: pb.ListRequest(),
    "GetOrganisation": lambda s: pb.GetRequest(id=s.organisation),
    "UpdateOrganisation": lambda s: pb.UpdateOrganisationRequest(id=s.organisation, name="New"),
    "DeleteOrganisation": lambda s: pb.DeleteRequest(id=s.organisation),
    "CreateProject": lambda s: pb.CreateProjectRequest(name="New"),
    "ListProjects": lambda s: pb.ListRequest(),
    "GetProject": lambda s: pb.GetRequest(id=s.project),
    "UpdateProject": lambda s: pb.UpdateProjectRequest(id=s.project, name="New"),
    "DeleteProject": lambda s: pb.DeleteRequest(id=s.project),
    "CreateUser": lambda s: pb.CreateUserRequest(email="new@example.com", name="New"),
    "InviteUser": lambda s: pb.InviteUserRequest(email="new@example.com", role="billing", project_id=s.project),
    "ListInvitations": lambda s: pb.ListRequest(),
    "RevokeInvitation": lambda s: pb.DeleteRequest(id=s.invitation),
    "ListUsers": lambda s: pb.ListUsersRequest(),
    "GetUser": lambda s: pb.GetRequest(id=s.user.id),
    "UpdateUser": lambda s: pb.UpdateUserRequest(id=s.user.id, name="New"),
    "SuspendUser": lambda s: pb.ChangeRequest(id=s.user.id),
    "ReinstateUser": lambda s: pb.ChangeRequest(id=s.user.id),
    "DeleteUser": lambda s: pb.DeleteRequest(id=s.user.id),
    "ResetUser": lambda s: pb.ChangeRequest(id=s.user.id),
    "ListUserSessions": lambda s: pb.ListUserSessionsRequest(user_id=s.user.id),
    "EndUserSessions": lambda s: pb.EndUserSessionsRequest(user_id=s.user.id),
    "ListMembers": lambda s: pb.ListMembersRequest(project_id=s.project),
    "SetMember": lambda s: pb.SetMemberRequest(user_id=s.user.id, project_id=s.project, role="billing"),
    "RemoveMember": lambda s: pb.RemoveMemberRequest(user_id=s.user.id, project_id=s.project),
    "CreateRole": lambda s: pb.CreateRoleRequest(name="new"),
    "ListRoles": lambda s: pb.ListRequest(),
    "GetRole": lambda s: pb.GetRequest(id=s.role),
    "UpdateRole": lambda s: pb.UpdateRoleRequest(id=s.role, description="New"),
    "DeleteRole": lambda s: pb.DeleteRequest(id=s.role),
    "CreateServiceAccount": lambda s: pb.CreateServiceAccountRequest(name="New", project_id=s.project, role="idle"),
    "ListServiceAccounts": lambda s: pb.ListInProjectRequest(project_id=s.project),
    "GetServiceAccount": lambda s: pb.GetRequest(id=s.program),
    "UpdateServiceAccount": lambda s: pb.UpdateServiceAccountRequest(id=s.program, name="New"),
    "DeleteServiceAccount": lambda s: pb.DeleteRequest(id=s.program),
    "CreateKey": lambda s: pb.CreateKeyRequest(name="New", project_id=s.project, scopes=["projects:read"]),
    "ListKeys": lambda s: pb.ListInProjectRequest(project_id=s.project),
    "GetKey": lambda s: pb.GetRequest(id=s.key),
    "UpdateKey": lambda s: pb.UpdateKeyRequest(id=s.key, name="New"),
    "RotateKey": lambda s: pb.RotateKeyRequest(id=s.key),
    "RevokeKey": lambda s: pb.ChangeRequest(id=s.key),
    "ListAuditRecords": lambda s: pb.ListAuditRecordsRequest(),
    "ExportAuditLog": lambda s: pb.ExportAuditLogRequest(),
    "RotateSigningKey": lambda s: pb.RotateSigningKeyRequest(),
    "CreateLimit": lambda s: usage_pb2.CreateLimitRequest(
        scope=metering_pb2.SCOPE_PROJECT,
        subject_id=s.project,
        metric=metering_pb2.METRIC_PARALLEL_REQUESTS,
        value=1,
    ),
    "ListLimits": lambda s: usage_pb2.ListPoliciesRequest(),
    "GetLimit": lambda s: pb.GetRequest(id=s.limit),
    "UpdateLimit": lambda s: usage_pb2.UpdateLimitRequest(id=s.limit, value=2),
    "DeleteLimit": lambda s: pb.DeleteRequest(id=s.limit),
    "CreateBudget": lambda s: usage_pb2.CreateBudgetRequest(
        scope=metering_pb2.SCOPE_PROJECT,
        subject_id=s.project,
        unit=metering_pb2.BUDGET_UNIT_TOKENS,
        period=metering_pb2.BUDGET_PERIOD_DAY,
        cap="1",
    ),
    "ListBudgets": lambda s: usage_pb2.ListPoliciesRequest(),
    "GetBudget": lambda s: pb.GetRequest(id=s.budget),
    "UpdateBudget": lambda s: usage_pb2.UpdateBudgetRequest(id=s.budget, cap="2"),
    "DeleteBudget": lambda s: pb.DeleteRequest(id=s.budget),
    "ListBudgetEvents": lambda s: usage_pb2.ListBudgetEventsRequest(budget_id=s.budget),
    "ListPrices": lambda s: usage_pb2.ListPricesRequest(),
    "GetPrice": lambda s: usage_pb2.GetPriceRequest(subject=MODEL),
    "SetPrice": lambda s: usage_pb2.SetPriceRequest(
        subject_kind="model", subject="another", rates=usage_pb2.Rates(input="1")
    ),
    "EndPrice": lambda s: usage_pb2.EndPriceRequest(id=s.price),
    "CheckRating": lambda s: usage_pb2.CheckRatingRequest(),
    "QueryUsage": lambda s: usage_pb2.QueryUsageRequest(project_ids=[s.project]),
    "ListRequests": lambda s: usage_pb2.ListRequestsRequest(project_id=s.project),
    "DescribeRequest": lambda s: pb.GetRequest(id=s.request),
    "ListJournals": lambda s: usage_pb2.ListJournalsRequest(),
    "CloseJournal": lambda s: pb.GetRequest(id=OTHER_JOURNAL),
}
# They name nothing: the caller's own organisation is meant, whichever that is.
UNNAMED = {
    *("CreateOrganisation", "ListOrganisations", "CreateProject", "ListProjects", "CreateUser", "ListInvitations"),
    *("ListUsers", "CreateRole", "ListRoles", "ListAuditRecords", "ExportAuditLog", "RotateSigningKey"),
    *("ListLimits", "ListBudgets", "ListPrices", "GetPrice", "SetPrice", "CheckRating"),
    *("ListJournals", "CloseJournal"),
}
# Whoever has the permission somewhere may ask; what they may not see is not there.
HIDDEN = {"DescribeRequest"}

# What the log says of each that is refused: what is changed or looked at, or where something was to be made or listed.
TARGETS: dict[str, Callable[[Scene], tuple[str, str]]] = {
    **{rpc: lambda s: ("organisation", s.organisation) for rpc in REQUESTS if rpc.endswith("Organisation")},
    **{rpc: lambda s: ("project", s.project) for rpc in REQUESTS if rpc.endswith("Project")},
    **{rpc: lambda s: ("user", s.user.id) for rpc in REQUESTS if rpc.endswith(("User", "UserSessions", "Member"))},
    **{rpc: lambda s: ("role", s.role) for rpc in REQUESTS if rpc.endswith("Role")},
    **{rpc: lambda s: ("service_account", s.program) for rpc in REQUESTS if rpc.endswith("ServiceAccount")},
    **{rpc: lambda s: ("key", s.key) for rpc in REQUESTS if rpc.endswith("Key")},
    **dict.fromkeys(
        ("InviteUser", "ListMembers", "CreateServiceAccount", "ListServiceAccounts", "CreateKey", "ListKeys"),
        lambda s: ("project", s.project),
    ),
    "RevokeInvitation": lambda s: ("invitation", s.invitation),
    "InviteOwner": lambda s: ("organisation", s.organisation),
    **{rpc: lambda s: ("model", "") for rpc in REQUESTS if rpc.endswith("Model")},
    **{rpc: lambda s: ("configuration", "") for rpc in REQUESTS if rpc.endswith(("Configuration", "Configurations"))},
    "ListFollowers": lambda s: ("follower", ""),
    "ListPools": lambda s: ("pool", ""),
    "DrainPool": lambda s: ("pool", ""),
    "SetShares": lambda s: ("organisation", s.organisation),
    "CreateOrganisation": lambda s: ("organisation", ""),
    "ListOrganisations": lambda s: ("organisation", ""),
    "CreateProject": lambda s: ("project", ""),
    "ListProjects": lambda s: ("project", ""),
    "CreateUser": lambda s: ("user", ""),
    "ListUsers": lambda s: ("user", ""),
    "ListInvitations": lambda s: ("invitation", ""),
    "CreateRole": lambda s: ("role", ""),
    "ListRoles": lambda s: ("role", ""),
    "ListAuditRecords": lambda s: ("audit_record", ""),
    "ExportAuditLog": lambda s: ("audit_log", ""),
    "RotateSigningKey": lambda s: ("signing_key", ""),
    **{rpc: lambda s: ("limit", s.limit) for rpc in REQUESTS if rpc.endswith("Limit")},
    **{rpc: lambda s: ("budget", s.budget) for rpc in REQUESTS if rpc.endswith("Budget")},
    **{rpc: lambda s: ("price", "") for rpc in REQUESTS if rpc.endswith(("Price", "Prices"))},
    "EndPrice": lambda s: ("price", s.price),
    "CreateLimit": lambda s: ("limit", ""),
    "CreateBudget": lambda s: ("budget", ""),
    "ListLimits": lambda s: ("limit", ""),
    "ListBudgets": lambda s: ("budget", ""),
    "ListBudgetEvents": lambda s: ("budget_event", ""),
    "CheckRating": lambda s: ("rating", ""),
    "QueryUsage": lambda s: ("usage", ""),
    "ListRequests": lambda s: ("project", s.project),
    "DescribeRequest": lambda s: ("request", s.request),
    "ListJournals": lambda s: ("journal", ""),
    "CloseJournal": lambda s: ("journal", OTHER_JOURNAL),
}


@pytest.fixture
async def auth(database: Database) -> AsyncIterator[Installation]:
    installation = Installation(Rehearsal(database), pools=RecordingPools())
    yield installation
    await installation.close()


@pytest.fixture
async def stage(database: Database) -> AsyncIterator[Installation]:
    """Where the scene is set, for good."""
    installation = Installation(database)
    yield installation
    await installation.close()


async def set_scene(stage: Installation) -> Scene:
    acme, other = await stage.add_organisation("Acme"), await stage.add_organisation("Other")
    project, other_project = await stage.add_project(acme, "P"), await stage.add_project(acme, "Q")
    owner = await stage.add_person(acme, roles={"": "owner"})
    invited = await stage.call(owner, "InviteUser", pb.InviteUserRequest(email="i@example.com", role="billing"))
    role = await stage.call(owner, "CreateRole", pb.CreateRoleRequest(name="reader"))
    # Programs may do nothing, so that everybody may give them that.
    await stage.call(owner, "CreateRole", pb.CreateRoleRequest(name="idle"))
    program = await stage.call(
        owner, "CreateServiceAccount", pb.CreateServiceAccountRequest(name="CI", project_id=project, role="idle")
    )
    key, _ = await stage.add_key(acme, project, scopes=["projects:read"])
    limit = usage_pb2.CreateLimitRequest(
        scope=metering_pb2.SCOPE_ORGANISATION, metric=metering_pb2.METRIC_PARALLEL_REQUESTS, value=1
    )
    budget = usage_pb2.CreateBudgetRequest(
        scope=metering_pb2.SCOPE_ORGANISATION,
        unit=metering_pb2.BUDGET_UNIT_MONEY,
        period=metering_pb2.BUDGET_PERIOD_TOTAL,
        cap="1",
    )
    operator = await stage.add_person(other, roles={"": "owner"}, operator=True)
    await stage.call(operator, "GetConfiguration", configuration_pb2.GetConfigurationRequest())
    price = usage_pb2.SetPriceRequest(subject_kind="model", subject=MODEL, rates=usage_pb2.Rates(input="1"))
    priced = await stage.call(operator, "SetPrice", price)
    used = make_row(1, organisation_id=acme, project_id=project, admitted_at_ms=stage.now * 1000)
    await stage.metering.ledger.ship_records(ship([(1, used)]))
    opening = metering_pb2.OpenJournalRequest(journal_id=OTHER_JOURNAL, node_id=NODE, opened_at_ms=stage.now * 1000)
    await stage.metering.ledger.open_journal(opening)
    return Scene(
        organisation=acme,
        project=project,
        other_project=other_project,
        other_organisation=other,
        user=await stage.add_person(acme, roles={project: "billing"}),
        invitation=invited.invitation.id,
        role=role.id,
        program=program.id,
        key=key,
        limit=(await stage.call(owner, "CreateLimit", limit)).id,
        budget=(await stage.call(owner, "CreateBudget", budget)).id,
        price=priced.id,
        request=used.call_id,
    )


async def outcome(auth: Installation, caller: Person | str | None, rpc: str, scene: Scene) -> ErrorKind | None:
    """None when it was done. Whatever else is wrong with a request is a mistake of this test."""
    try:
        await auth.call(caller, rpc, REQUESTS[rpc](scene))
    except HelixError as exc:
        return exc.kind
    return None


def roles_at(who: str, project: str) -> dict[str, str]:
    return {project: who} if who in ROLES else {}


def holds(who: str, access: Access) -> bool:
    """Whether the role has the permission, wherever it holds."""
    return who in ROLES and access.permission in ROLES[who]


def expected(place: str, who: str, access: Access, rpc: str) -> ErrorKind | None:
    """What becomes of a call that is about `Scene.project` or the organisation, by somebody with that role there."""
    if access.level is Level.INSTALLATION:
        return None if who == OPERATOR else ErrorKind.PERMISSION_DENIED
    match place:
        case "organisation":
            reaches = True
        case "project":
            reaches = access.level is Level.PROJECT
        case "other project":
            # A list without a project has what the caller may see: here that of the other project.
            reaches = access.level is Level.PROJECT and rpc in UNNAMED
            if rpc in HIDDEN and holds(who, access):
                return ErrorKind.NOT_FOUND
        case _:
            # The permission counts in the caller's own organisation. There, nothing of this one exists.
            if holds(who, access):
                return None if rpc in UNNAMED else ErrorKind.NOT_FOUND
            reaches = False
    return None if reaches and holds(who, access) else ErrorKind.PERMISSION_DENIED


def test_no_rpc_is_forgotten() -> None:
    assert set(REQUESTS) == set(ACCESS)
    assert {rpc for rpc, access in ACCESS.items() if access.level is Level.INSTALLATION} == {
        rpc for rpc, access in ACCESS.items() if access.permission in INSTALLATION_PERMISSIONS
    }
    assert {access.level for access in ACCESS.values()} == {Level.PROJECT, Level.ORGANISATION, Level.INSTALLATION}


def test_what_writes_says_so() -> None:
    reads = {rpc for rpc, access in ACCESS.items() if not access.writes}
    assert reads == {rpc for rpc in ACCESS if rpc.startswith(("Get", "List", "Query", "Describe", "Check", "Plan"))}
    assert {rpc for rpc, access in ACCESS.items() if access.idempotent} == {
        *(rpc for rpc in ACCESS if rpc.startswith("Create")),
        *("InviteUser", "InviteOwner", "RotateKey", "SetPrice"),
    }


@on_sqlite
@pytest.mark.parametrize("place", ["organisation", "project", "other project", "other organisation"])
async def test_what_each_role_may_do(stage: Installation, auth: Installation, place: str) -> None:
    scene = await set_scene(stage)
    wrong = []
    for who in WHO:
        organisation = scene.other_organisation if place == "other organisation" else scene.organisation
        where = {"project": scene.project, "other project": scene.other_project}.get(place, "")
        roles = roles_at(who, where)
        if not roles:
            # A member all the same, of something that is of no matter: without that there is no session.
            roles = {await stage.add_project(organisation, f"of {who}"): "reader"}
        caller = await stage.add_person(organisation, roles=roles, operator=who == OPERATOR)
        for rpc, access in ACCESS.items():
            found = await outcome(auth, caller, rpc, scene)
            if found is not (wanted := expected(place, who, access, rpc)):
                wrong.append((who, rpc, f"{found} instead of {wanted}"))
    assert wrong == []


@on_sqlite
async def test_nothing_is_permitted_to_the_suspended_the_unknown_and_the_anonymous(
    stage: Installation, auth: Installation
) -> None:
    scene = await set_scene(stage)
    suspended = await stage.add_person(scene.organisation, roles={"": "owner"}, operator=True, suspended=True)
    left = await stage.add_person(scene.organisation, operator=True)
    for caller in (suspended, left, None):
        for rpc in ACCESS:
            assert await outcome(auth, caller, rpc, scene) is ErrorKind.INVALID_TOKEN, (caller, rpc)


@on_sqlite
async def test_lists_show_nothing_of_another_organisation(stage: Installation, auth: Installation) -> None:
    scene = await set_scene(stage)
    stranger = await stage.add_person(scene.other_organisation, roles={"": "owner"})
    secret = (
        *(scene.organisation, scene.project, scene.other_project, scene.user.id, scene.user.email, scene.invitation),
        *(scene.role, scene.program, scene.key, scene.limit, scene.budget, scene.request),
    )
    for rpc in UNNAMED:
        if ACCESS[rpc].level is not Level.INSTALLATION and not ACCESS[rpc].idempotent:
            answer = str(await auth.call(stranger, rpc, REQUESTS[rpc](scene)))
            assert not [found for found in secret if found in answer], rpc
    both = pb.ListInProjectRequest()
    for rpc in ("ListKeys", "ListServiceAccounts"):
        assert not str(await auth.call(stranger, rpc, both))
    assert not str(await auth.call(stranger, "ListRequests", usage_pb2.ListRequestsRequest()))
    assert (await auth.call(stranger, "QueryUsage", usage_pb2.QueryUsageRequest())).total.requests == 0
    assert not (await auth.call(stranger, "ListBudgetEvents", usage_pb2.ListBudgetEventsRequest())).events


@on_sqlite
async def test_every_refusal_of_somebody_known_is_recorded(stage: Installation) -> None:
    """Who, what and on what: also where only the request says what it was about."""
    scene = await set_scene(stage)
    caller = await stage.add_person(scene.organisation, roles={scene.other_project: "billing"})
    before = {chain: len(await stage.audited(chain)) for chain in ("", scene.organisation)}
    expected: dict[str, list[tuple[str, str, str]]] = {"": [], scene.organisation: []}
    for rpc, access in ACCESS.items():
        found = await outcome(stage, caller, rpc, scene)
        if found is not None:
            assert found is (ErrorKind.NOT_FOUND if rpc in HIDDEN else ErrorKind.PERMISSION_DENIED), rpc
            action = "".join(f"_{char.lower()}" if char.isupper() else char for char in rpc).lstrip("_")
            chain = "" if access.level is Level.INSTALLATION else scene.organisation
            expected[chain].append((action, *TARGETS[rpc](scene)))
    for chain, acts in expected.items():
        records = (await stage.audited(chain))[before[chain] :]
        assert [(row.action, row.target_kind, row.target_id) for row in records] == acts
        assert {(row.outcome, row.actor_id) for row in records} == {("denied", caller.id)}
        assert {row.reason for row in records} <= {"permission_denied", "not_found"}
    refused = {action for acts in expected.values() for action, *_ in acts}
    assert len(refused) > len(ACCESS) / 2


@on_sqlite
async def test_what_is_looked_for_elsewhere_is_recorded(stage: Installation) -> None:
    """A known caller who tries ids of another organisation gets 404s, and leaves traces in their own log."""
    scene = await set_scene(stage)
    stranger = await stage.add_person(scene.other_organisation, roles={"": "owner"})
    before = len(await stage.audited(scene.other_organisation))
    expected = []
    for rpc in ("GetProject", "GetKey", "UpdateUser", "EndUserSessions", "DeleteRole"):
        assert await outcome(stage, stranger, rpc, scene) is ErrorKind.NOT_FOUND
        expected.append(("denied", "not_found", *TARGETS[rpc](scene)))
    records = (await stage.audited(scene.other_organisation))[before:]
    assert [(row.outcome, row.reason, row.target_kind, row.target_id) for row in records] == expected


@on_sqlite
async def test_a_key_that_is_used_from_elsewhere_is_recorded(stage: Installation) -> None:
    scene = await set_scene(stage)
    _, secret = await stage.add_key(
        scene.organisation, scene.project, scopes=["projects:read"], networks=["10.0.0.0/8"]
    )
    before = len(await stage.audited(scene.organisation))
    assert await outcome(stage, secret, "GetProject", scene) is ErrorKind.PERMISSION_DENIED
    (record,) = (await stage.audited(scene.organisation))[before:]
    assert (record.actor_kind, record.action, record.outcome, record.reason, record.target_kind, record.target_id) == (
        *("key", "get_project", "denied", "permission_denied", "project", scene.project),
    )
