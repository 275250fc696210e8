"""Limits: who makes, sees and changes which, and what is no limit."""

from typing import Any

import pytest

from helixflow.auth.limits import MAX_VALUE
from helixflow.auth.policy_table import MAX_POLICIES
from helixflow.auth.policy_tidying import prune_policies
from helixflow.core.errors import ErrorKind
from helixflow.metering.policies import Metric, Scope
from helixflow.rpc.generated.auth_v1 import admin_pb2, metering_pb2
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_POLICIES
from helixflow.storage.schema import limits
from tests.harness.auth import Installation, Person, refused

ORGANISATION: Any = Scope.ORGANISATION.value
RPM: Any = Metric.REQUESTS_PER_MINUTE.value
PARALLEL: Any = Metric.PARALLEL_REQUESTS.value


def wanted(**fields: Any) -> pb.CreateLimitRequest:
    """A limit of 60 requests a minute on the caller's organisation, or as `fields` say."""
    return pb.CreateLimitRequest(**{"scope": ORGANISATION, "metric": RPM, "value": 60, **fields})


def on(scope: Scope, subject: str = "", **fields: Any) -> pb.CreateLimitRequest:
    return wanted(scope=scope.value, subject_id=subject, **fields)


async def owner(auth: Installation, **fields: Any) -> Person:
    return await auth.add_person(await auth.add_organisation(), roles={"": "owner"}, **fields)


async def operator(auth: Installation) -> Person:
    return await owner(auth, operator=True)


async def make(auth: Installation, caller: Person, request: pb.CreateLimitRequest) -> pb.Limit:
    made = await auth.call(caller, "CreateLimit", request)
    assert isinstance(made, pb.Limit)
    return made


async def listed(auth: Installation, caller: Person, **fields: Any) -> set[str]:
    return {limit.id for limit in (await auth.call(caller, "ListLimits", pb.ListPoliciesRequest(**fields))).limits}


async def test_a_limit_is_made_read_changed_deleted_recorded_and_told(auth: Installation) -> None:
    ada = await owner(auth)
    made = await make(auth, ada, wanted(model="smollm2", burst=10))
    assert (made.organisation_id, made.scope, made.subject_id) == (
        ada.organisation_id,
        ORGANISATION,
        ada.organisation_id,
    )
    assert (made.model, made.metric, made.value, made.burst, made.imposed) == ("smollm2", RPM, 60, 10, False)
    assert made == await auth.call(ada, "GetLimit", admin_pb2.GetRequest(id=made.id))
    auth.clock.advance(5)
    change = pb.UpdateLimitRequest(id=made.id, if_version=1, value=120)
    changed = await auth.call(ada, "UpdateLimit", change)
    assert (changed.value, changed.burst, changed.version) == (120, 10, 2)
    assert changed.updated_at == made.updated_at + 5
    async with refused(ErrorKind.PRECONDITION_FAILED):
        await auth.call(ada, "UpdateLimit", change)
    async with refused(ErrorKind.PRECONDITION_FAILED):
        await auth.call(ada, "DeleteLimit", admin_pb2.DeleteRequest(id=made.id, if_version=1))
    # What changes nothing is told to nobody.
    assert await auth.call(ada, "UpdateLimit", pb.UpdateLimitRequest(id=made.id, value=120)) == changed
    told = (CHANGE_KIND_POLICIES, ada.organisation_id, ada.organisation_id)
    assert await auth.told() == [told] * 2
    await auth.call(ada, "DeleteLimit", admin_pb2.DeleteRequest(id=made.id))
    assert await auth.told() == [told] * 3
    async with refused(ErrorKind.NOT_FOUND, "id"):
        await auth.call(ada, "GetLimit", admin_pb2.GetRequest(id=made.id))
    records = await auth.audited(ada.organisation_id, outcome="done")
    assert [row.action for row in records] == ["create_limit", "update_limit", "delete_limit"]
    assert '"metric":"requests_per_minute"' in records[0].after and '"value":120' in records[2].before
    assert not await auth.audited("", outcome="done")


async def test_a_limit_is_on_what_the_organisation_has(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)
    mine, theirs = ada.organisation_id, eve.organisation_id
    project, other = await auth.add_project(mine), await auth.add_project(theirs)
    key, _ = await auth.add_key(mine, project)
    other_key, _ = await auth.add_key(theirs, other)
    program = await auth.call(
        ada, "CreateServiceAccount", admin_pb2.CreateServiceAccountRequest(name="CI", role="developer")
    )
    member = await auth.add_person(theirs, roles={})
    await auth.add_membership(member.id, mine, "viewer", project)
    right = [
        (Scope.PROJECT, project),
        (Scope.USER, ada.id),
        (Scope.USER, member.id),
        (Scope.USER, program.id),
        (Scope.KEY, key),
        (Scope.ORGANISATION, ""),
    ]
    for scope, subject in right:
        assert (await make(auth, ada, on(scope, subject))).subject_id == (subject or mine)
    wrong = [
        (Scope.PROJECT, other),
        (Scope.PROJECT, key),
        (Scope.USER, eve.id),
        (Scope.USER, project),
        (Scope.KEY, other_key),
        (Scope.KEY, "key_none"),
        (Scope.ORGANISATION, theirs),
    ]
    for scope, subject in wrong:
        async with refused(ErrorKind.NOT_FOUND, "subject_id"):
            await make(auth, ada, on(scope, subject))
    for scope in (Scope.PROJECT, Scope.USER, Scope.KEY):
        async with refused(ErrorKind.UNPROCESSABLE, "subject_id"):
            await make(auth, ada, on(scope))
    await auth.call(ada, "RevokeKey", admin_pb2.ChangeRequest(id=key))
    async with refused(ErrorKind.UNPROCESSABLE, "subject_id"):
        await make(auth, ada, on(Scope.KEY, key, metric=PARALLEL))
    assert len(await listed(auth, ada, scope=Scope.USER.value)) == 3
    assert len(await listed(auth, ada, subject_id=project)) == 1


NO_LIMITS: list[tuple[str, dict[str, Any]]] = [
    ("value", {"value": 0}),
    ("value", {"value": -1}),
    ("value", {"value": MAX_VALUE + 1}),
    ("burst", {"burst": -1}),
    ("burst", {"burst": 601}),
    ("burst", {"metric": PARALLEL, "burst": 1}),
    ("metric", {"metric": 0}),
    ("metric", {"metric": 5}),
    ("scope", {"scope": 0}),
    ("scope", {"scope": 6}),
    ("model", {"model": "a b"}),
    ("model", {"model": "m" * 1000}),
    ("model", {"model": "m\0"}),
    ("imposed", {"scope": Scope.INSTALLATION.value}),
    ("subject_id", {"scope": Scope.INSTALLATION.value, "imposed": True, "subject_id": "x"}),
    ("organisation_id", {"scope": Scope.INSTALLATION.value, "imposed": True, "organisation_id": "x"}),
]


async def test_what_is_no_limit_is_refused_by_its_field(auth: Installation) -> None:
    root = await operator(auth)
    for param, fields in NO_LIMITS:
        async with refused(ErrorKind.UNPROCESSABLE, param):
            await make(auth, root, wanted(**fields))
    assert not await auth.rows(limits)


async def test_the_largest_and_smallest_are_kept_as_they_are(auth: Installation) -> None:
    ada = await owner(auth)
    largest = await make(auth, ada, wanted(value=MAX_VALUE, burst=10 * MAX_VALUE, model="a"))
    assert (largest.value, largest.burst) == (MAX_VALUE, 10 * MAX_VALUE)
    assert (await make(auth, ada, wanted(value=1))).burst == 1
    assert (await make(auth, ada, wanted(metric=PARALLEL, value=3))).burst == 0


async def test_a_burst_that_was_as_the_value_follows_it(auth: Installation) -> None:
    ada = await owner(auth)
    plain, bursting = await make(auth, ada, wanted()), await make(auth, ada, wanted(model="m", burst=600))
    lowered = await auth.call(ada, "UpdateLimit", pb.UpdateLimitRequest(id=plain.id, value=6))
    assert (lowered.value, lowered.burst) == (6, 6)
    async with refused(ErrorKind.UNPROCESSABLE, "burst"):
        await auth.call(ada, "UpdateLimit", pb.UpdateLimitRequest(id=bursting.id, value=59))
    both = await auth.call(ada, "UpdateLimit", pb.UpdateLimitRequest(id=bursting.id, value=6, burst=0))
    assert (both.value, both.burst) == (6, 6)
    async with refused(ErrorKind.UNPROCESSABLE, "value"):
        await auth.call(ada, "UpdateLimit", pb.UpdateLimitRequest(id=plain.id, value=0))


async def test_there_is_one_of_each_kind_and_an_imposed_one_beside_it(auth: Installation) -> None:
    root = await operator(auth)
    first = await make(auth, root, wanted())
    async with refused(ErrorKind.CONFLICT):
        await make(auth, root, wanted(value=7))
    others = [wanted(model="m"), wanted(metric=PARALLEL), wanted(imposed=True), on(Scope.USER, root.id)]
    made = {(await make(auth, root, request)).id for request in others}
    assert len(made | {first.id}) == 5
    assert await listed(auth, root) == made | {first.id}


async def test_imposed_limits_are_seen_by_the_organisation_and_changed_by_operators(auth: Installation) -> None:
    ada, root = await owner(auth), await operator(auth)
    eve = await owner(auth)
    made = await make(auth, root, wanted(imposed=True, organisation_id=ada.organisation_id))
    assert (made.organisation_id, made.subject_id, made.imposed) == (ada.organisation_id, ada.organisation_id, True)
    assert await auth.told() == [(CHANGE_KIND_POLICIES, ada.organisation_id, ada.organisation_id)]
    assert await listed(auth, ada) == {made.id}
    assert await auth.call(ada, "GetLimit", admin_pb2.GetRequest(id=made.id)) == made
    for rpc, request in (
        ("UpdateLimit", pb.UpdateLimitRequest(id=made.id, value=6000)),
        ("DeleteLimit", admin_pb2.DeleteRequest(id=made.id)),
    ):
        async with refused(ErrorKind.PERMISSION_DENIED):
            await auth.call(ada, rpc, request)
        async with refused(ErrorKind.NOT_FOUND, "id"):
            await auth.call(eve, rpc, request)
    async with refused(ErrorKind.NOT_FOUND, "id"):
        await auth.call(eve, "GetLimit", admin_pb2.GetRequest(id=made.id))
    assert await listed(auth, root, organisation_id=ada.organisation_id) == {made.id}
    changed = await auth.call(root, "UpdateLimit", pb.UpdateLimitRequest(id=made.id, value=6000))
    assert changed.value == 6000
    await auth.call(root, "DeleteLimit", admin_pb2.DeleteRequest(id=made.id))
    for chain in ("", ada.organisation_id):
        records = await auth.audited(chain, outcome="done")
        assert [(row.action, row.actor_id) for row in records] == [
            *(("create_limit", root.id), ("update_limit", root.id), ("delete_limit", root.id)),
        ]


async def test_only_operators_impose_and_look_elsewhere(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)
    for request in (
        wanted(imposed=True),
        wanted(organisation_id=eve.organisation_id),
        wanted(organisation_id="org_none"),
        wanted(imposed=True, organisation_id=eve.organisation_id),
        on(Scope.INSTALLATION),
        on(Scope.INSTALLATION, imposed=True),
    ):
        async with refused(ErrorKind.PERMISSION_DENIED):
            await make(auth, ada, request)
    async with refused(ErrorKind.PERMISSION_DENIED):
        await listed(auth, ada, organisation_id=eve.organisation_id)
    # One's own may be named.
    made = await make(auth, ada, wanted(organisation_id=ada.organisation_id))
    assert await listed(auth, ada, organisation_id=ada.organisation_id) == {made.id}


async def test_operators_leave_an_organisations_own_limits_to_it(auth: Installation) -> None:
    ada, root = await owner(auth), await operator(auth)
    made = await make(auth, ada, wanted())
    assert await auth.call(root, "GetLimit", admin_pb2.GetRequest(id=made.id)) == made
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(root, "DeleteLimit", admin_pb2.DeleteRequest(id=made.id))
    async with refused(ErrorKind.UNPROCESSABLE, "imposed"):
        await make(auth, root, wanted(organisation_id=ada.organisation_id))
    async with refused(ErrorKind.NOT_FOUND, "organisation_id"):
        await make(auth, root, wanted(organisation_id="org_none", imposed=True))
    async with refused(ErrorKind.NOT_FOUND, "organisation_id"):
        await listed(auth, root, organisation_id="org_none")


async def test_limits_of_the_installation_are_the_operators(auth: Installation) -> None:
    ada, root = await owner(auth), await operator(auth)
    made = await make(auth, root, on(Scope.INSTALLATION, imposed=True, model="smollm2"))
    assert (made.organisation_id, made.subject_id) == ("", "")
    assert await auth.told() == [(CHANGE_KIND_POLICIES, "", "")]
    assert (await listed(auth, root), await listed(auth, ada)) == ({made.id}, set())
    async with refused(ErrorKind.NOT_FOUND, "id"):
        await auth.call(ada, "GetLimit", admin_pb2.GetRequest(id=made.id))
    assert [row.action for row in await auth.audited("", outcome="done")] == ["create_limit"]
    assert not await auth.audited(root.organisation_id, outcome="done")


async def test_the_bootstrap_key_imposes_and_other_keys_do_not(auth: Installation) -> None:
    ada = await owner(auth)
    project = await auth.add_project(ada.organisation_id)
    _, first = await auth.add_key(ada.organisation_id, project, bootstrap=True)
    _, own = await auth.add_key(ada.organisation_id, project, owner_id=ada.id, scopes=["limits:read", "limits:update"])
    request = on(Scope.INSTALLATION, imposed=True)
    assert (await auth.call(first, "CreateLimit", request)).imposed
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(own, "CreateLimit", request)
    assert not (await auth.call(own, "CreateLimit", wanted())).imposed


async def test_there_are_no_more_than_so_many(auth: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_POLICIES == 1000
    monkeypatch.setattr("helixflow.auth.policy_table.MAX_POLICIES", 3)
    ada, eve = await owner(auth), await owner(auth)
    for model in ("a", "b", "c"):
        await make(auth, ada, wanted(model=model))
    async with refused(ErrorKind.CONFLICT):
        await make(auth, ada, wanted(model="d"))
    await make(auth, eve, wanted())


async def test_pages_have_the_newest_first(auth: Installation) -> None:
    ada = await owner(auth)
    made = []
    for model in ("a", "b", "c", "d", "e"):
        made.append((await make(auth, ada, wanted(model=model))).id)
        auth.clock.advance(1)
    seen, cursor = [], ""
    while not seen or cursor:
        page = await auth.call(ada, "ListLimits", pb.ListPoliciesRequest(page_size=2, cursor=cursor))
        seen += [limit.id for limit in page.limits]
        cursor = page.next_cursor
    assert seen == made[::-1]
    async with refused(ErrorKind.UNPROCESSABLE, "scope"):
        await listed(auth, ada, scope=9)


async def rotate(auth: Installation, caller: Person, key: str, overlap_s: int = 0) -> str:
    """The id of its successor."""
    rotated = await auth.call(caller, "RotateKey", admin_pb2.RotateKeyRequest(id=key, overlap_s=overlap_s))
    return str(rotated.key.id)


async def resolved(auth: Installation, organisation: str, **request: str) -> metering_pb2.ResolvePoliciesResponse:
    wanted = metering_pb2.ResolvePoliciesRequest(organisation_id=organisation, **request)
    return await auth.metering.ResolvePolicies(wanted, None)  # type: ignore[arg-type]


async def test_limits_of_a_key_hold_for_all_that_it_is_rotated_to(auth: Installation) -> None:
    ada, root = await owner(auth), await operator(auth)
    mine = ada.organisation_id
    project = await auth.add_project(mine)
    first, _ = await auth.add_key(mine, project, owner_id=ada.id, scopes=["models:use"])
    other, _ = await auth.add_key(mine, project, owner_id=ada.id, scopes=["models:use"])
    own = await make(auth, ada, on(Scope.KEY, first, model="m", burst=7))
    imposed = await make(auth, root, on(Scope.KEY, first, imposed=True, organisation_id=mine))
    await make(auth, ada, on(Scope.KEY, other))
    second = await rotate(auth, ada, first, overlap_s=3600)
    third = await rotate(auth, ada, second)
    on_third = await make(auth, ada, on(Scope.KEY, third))
    assert len(await auth.rows(limits)) == 4
    of = {first: {own.id, imposed.id}, second: {own.id, imposed.id}, third: {own.id, imposed.id, on_third.id}}
    predecessors = {first: set[str](), second: {first}, third: {first, second}}
    for key, expected in of.items():
        answer = await resolved(auth, mine, project_id=project, user_id=ada.id, key_id=key)
        assert {limit.id for limit in answer.limits} == expected
        assert {limit.subject_id for limit in answer.limits} <= {first, third}
        assert set(answer.predecessors) == predecessors[key]
        assert await listed(auth, ada, subject_id=key) == expected
        assert await listed(auth, ada, subject_id=key, scope=Scope.KEY.value) == expected
    # An organisation with the same key in its question has nothing to do with it.
    assert not (await resolved(auth, root.organisation_id, key_id=third)).limits


async def test_limits_of_a_key_live_as_long_as_what_it_was_rotated_to(auth: Installation) -> None:
    ada = await owner(auth)
    project = await auth.add_project(ada.organisation_id)
    first, _ = await auth.add_key(ada.organisation_id, project, owner_id=ada.id, scopes=["models:use"])
    on_first = await make(auth, ada, on(Scope.KEY, first))
    second = await rotate(auth, ada, first, overlap_s=3600)
    on_second = await make(auth, ada, on(Scope.KEY, second))
    third = await rotate(auth, ada, second)
    await prune_policies(auth.database, auth.now + 3600)
    assert {row.id for row in await auth.rows(limits)} == {on_first.id, on_second.id}
    # The first one still works for a while: what is on the second one does not hold for it.
    await auth.call(ada, "RevokeKey", admin_pb2.ChangeRequest(id=third))
    await prune_policies(auth.database, auth.now)
    assert [row.id for row in await auth.rows(limits)] == [on_first.id]
    await prune_policies(auth.database, auth.now + 3600)
    assert not await auth.rows(limits)


async def test_limits_end_with_what_they_are_on(auth: Installation) -> None:
    ada, eve = await owner(auth), await owner(auth)
    project, other = await auth.add_project(ada.organisation_id), await auth.add_project(ada.organisation_id, "Other")
    keys = [(await auth.add_key(ada.organisation_id, place))[0] for place in (project, other, other)]
    superseded, _ = await auth.add_key(ada.organisation_id, other, bootstrap=True)
    for key in (*keys, superseded):
        await make(auth, ada, on(Scope.KEY, key))
    for place in (project, other):
        await make(auth, ada, on(Scope.PROJECT, place))
    await make(auth, ada, wanted())
    theirs = await make(auth, eve, wanted())

    async def left() -> set[str]:
        return {row.subject_id for row in await auth.rows(limits, organisation_id=ada.organisation_id)}

    await auth.call(ada, "DeleteProject", admin_pb2.DeleteRequest(id=project))
    assert await left() == {*keys[1:], superseded, other, ada.organisation_id}
    await auth.call(ada, "RevokeKey", admin_pb2.ChangeRequest(id=keys[1]))
    await prune_policies(auth.database, auth.now)
    assert await left() == {keys[2], superseded, other, ada.organisation_id}
    await auth.call(ada, "DeleteOrganisation", admin_pb2.DeleteRequest(id=ada.organisation_id))
    assert [row.id for row in await auth.rows(limits)] == [theirs.id]


async def test_what_applies_to_somebody_is_all_that_is_on_them(auth: Installation) -> None:
    ada, root, eve = await owner(auth), await operator(auth), await owner(auth)
    mine = ada.organisation_id
    project, other = await auth.add_project(mine), await auth.add_project(mine, "Other")
    key, _ = await auth.add_key(mine, project)
    other_key, _ = await auth.add_key(mine, project)
    on_installation = await make(auth, root, on(Scope.INSTALLATION, imposed=True))
    imposed = await make(auth, root, wanted(imposed=True, organisation_id=mine, metric=PARALLEL))
    own = await make(auth, ada, wanted(model="m", burst=6))
    on_project = await make(auth, ada, on(Scope.PROJECT, project))
    on_user = await make(auth, ada, on(Scope.USER, ada.id))
    on_key = await make(auth, ada, on(Scope.KEY, key))
    for request in (on(Scope.PROJECT, other), on(Scope.KEY, other_key)):
        await make(auth, ada, request)
    await make(auth, eve, wanted())
    budget = await auth.call(
        ada,
        "CreateBudget",
        pb.CreateBudgetRequest(scope=ORGANISATION, unit=1, period=2, cap="12.5"),  # type: ignore[arg-type]
    )

    found = await resolved(auth, mine, project_id=project, user_id=ada.id, key_id=key)
    everybody = {on_installation.id, imposed.id, own.id}
    assert {limit.id for limit in found.limits} == everybody | {on_project.id, on_user.id, on_key.id}
    (kept,) = (limit for limit in found.limits if limit.id == own.id)
    assert (kept.scope, kept.subject_id, kept.model, kept.metric, kept.value, kept.burst) == (
        *(ORGANISATION, mine, "m", RPM, 60, 6),
    )
    (of_money,) = found.budgets
    assert (of_money.id, of_money.cap, of_money.subject_id) == (budget.id, 12_500_000_000, mine)
    assert {limit.id for limit in (await resolved(auth, mine, project_id=other)).limits} > everybody
    assert {limit.id for limit in (await resolved(auth, mine)).limits} == everybody
    async with refused(ErrorKind.INVALID_VALUE, "organisation_id"):
        await auth.metering.ResolvePolicies(metering_pb2.ResolvePoliciesRequest(), None)  # type: ignore[arg-type]
