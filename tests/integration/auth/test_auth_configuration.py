"""The serving configuration in the auth service: its history, what a change touches, what is refused."""

import asyncio
import json
from contextlib import aclosing
from typing import Any

import pytest

from helixflow.auth.configuration.rules import Rules
from helixflow.auth.configuration.service import Found
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import configuration_pb2 as pb
from helixflow.settings.configuration import Models, Refused, document_of, read_document
from helixflow.settings.masking import HIDDEN
from helixflow.settings.problems import Problem
from helixflow.storage.engine import Database
from helixflow.storage.schema import serving_configurations
from tests.harness.auth import Installation, Person, refused
from tests.harness.ledger import make_row, ship

SECRET = "sk-inline-0123456789"


def deployment(**settings: Any) -> dict[str, Any]:
    return {"engine": "openai", "base_url": "https://models.example/v1", **settings}


def document(**models: list[dict[str, Any]]) -> str:
    return json.dumps({"models": [{"name": name, "deployments": given} for name, given in models.items()]})


def found(text: str, revision: int = 0, *, said: bool = True) -> Found:
    models = read_document(text)
    return Found(document_of(models), models, revision, said)


FILE = document(gpt=[deployment()], old=[deployment()])


@pytest.fixture
async def operator(auth: Installation) -> Person:
    auth.found = found(FILE)
    return await auth.add_person(await auth.add_organisation(), roles={"": "owner"}, operator=True)


async def apply(auth: Installation, who: Person, text: str, **more: Any) -> pb.Configuration:
    answer = await auth.call(who, "ApplyConfiguration", pb.ApplyConfigurationRequest(document=text, **more))
    assert isinstance(answer, pb.Configuration)
    return answer


async def in_force(auth: Installation, who: Person) -> dict[str, list[dict[str, Any]]]:
    answer = await auth.call(who, "GetConfiguration", pb.GetConfigurationRequest())
    return {model["name"]: model["deployments"] for model in json.loads(answer.document)["models"]}


async def listed(auth: Installation, who: Person, **page: Any) -> list[tuple[int, str, str, str]]:
    answer = await auth.call(who, "ListConfigurations", pb.ListConfigurationsRequest(**page))
    return [(one.version, one.origin, one.actor_id, one.note) for one in answer.configurations]


async def test_every_change_is_a_version_and_an_earlier_one_comes_back_as_a_new_one(
    auth: Installation, operator: Person
) -> None:
    assert list(await in_force(auth, operator)) == ["gpt", "old"]
    applied = await apply(auth, operator, document(gpt=[deployment(weight=3)]), note="more", origin="apply")
    assert (applied.version, applied.origin, applied.note, applied.created_at) == (2, "apply", "more", auth.now)
    same = await apply(auth, operator, document(gpt=[deployment(weight=3.0, tier=0)]))
    assert same.version == 2, "what says the same makes no version"
    restored = await auth.call(operator, "RestoreConfiguration", pb.RestoreConfigurationRequest(revision=1))
    assert (restored.version, restored.origin) == (3, "rollback")
    assert list(await in_force(auth, operator)) == ["gpt", "old"]
    assert await listed(auth, operator) == [
        (3, "rollback", operator.id, "back to 1"),
        (2, "apply", operator.id, "more"),
        (1, "file", "", ""),
    ]
    earlier = await auth.call(operator, "GetConfiguration", pb.GetConfigurationRequest(revision=2))
    assert json.loads(earlier.document)["models"][0]["deployments"] == [deployment(weight=3)]
    async with refused(ErrorKind.NOT_FOUND, "revision"):
        await auth.call(operator, "RestoreConfiguration", pb.RestoreConfigurationRequest(revision=9))


async def test_a_plan_says_what_changes_and_which_recorded_requests_it_touches(
    auth: Installation, operator: Person
) -> None:
    lately, before = auth.now * 1000, (auth.now - 3 * 86_400) * 1000
    organisation = {"organisation_id": operator.organisation_id}
    rows = [
        make_row(1, admitted_at_ms=before, model="old", deployment="old/openai-0", **organisation),
        *(make_row(n, admitted_at_ms=lately, model="old", deployment="old/openai-0", **organisation) for n in (2, 3)),
        make_row(4, admitted_at_ms=lately, model="gpt", deployment="gpt/openai-0", **organisation),
    ]
    await auth.metering.ledger.ship_records(ship(list(enumerate(rows, start=1))))
    wanted = document(gpt=[deployment(weight=3), deployment(region="eu")], new=[deployment()])
    plan = await auth.call(operator, "PlanConfiguration", pb.PlanConfigurationRequest(document=wanted))
    assert plan.version == 1
    assert [(one.kind, one.deployment or one.model, one.requests, one.unserved) for one in plan.changes] == [
        ("changed", "gpt/openai-0", 1, False),
        ("added", "gpt/openai-1", 0, False),
        ("added", "new", 0, False),
        ("added", "new/openai-0", 0, False),
        ("removed", "old", 2, True),
        ("removed", "old/openai-0", 2, False),
    ]
    assert [(field.name, field.before, field.after) for field in plan.changes[0].fields] == [("weight", "1.0", "3.0")]
    assert list(await in_force(auth, operator)) == ["gpt", "old"], "a plan changes nothing"


async def test_only_one_of_two_who_saw_the_same_version_changes_it(auth: Installation, operator: Person) -> None:
    await apply(auth, operator, document(gpt=[deployment(weight=2)]), if_version=1)
    async with refused(ErrorKind.PRECONDITION_FAILED):
        await apply(auth, operator, document(gpt=[deployment(weight=5)]), if_version=1)
    assert (await in_force(auth, operator))["gpt"] == [deployment(weight=2)]


@pytest.mark.parametrize(
    ("text", "param", "message"),
    [
        ("{", "models", "not valid JSON"),
        ("[]", "models", "is an object"),
        ("{}", "models", "Field required"),
        (document(a=[deployment(), deployment(weight=-1)]), "models[0].deployments[1].weight", "greater than or equal"),
        (document(a=[deployment(wieght=1)]), "models[0].deployments[0].wieght", "unknown key"),
        (document(a=[{"engine": "openia"}]), "models[0].deployments[0].engine", "unknown engine 'openia'"),
        ('{"models":[{"name":"a"},{"name":"b","fallbacks":["c"]}]}', "models", "'c', which is not defined"),
        (document(a=[deployment(headers={"x": HIDDEN})]), "models[0].deployments[0].headers.x", "is hidden"),
    ],
)
async def test_what_is_wrong_is_refused_with_its_path_and_changes_nothing(
    auth: Installation, operator: Person, text: str, param: str, message: str
) -> None:
    for rpc in ("ApplyConfiguration", "PlanConfiguration"):
        request: Any = getattr(pb, f"{rpc}Request")(document=text)
        with pytest.raises(HelixError, match=message) as caught:
            await auth.call(operator, rpc, request)
        assert (caught.value.kind, caught.value.param) == (ErrorKind.UNPROCESSABLE, param)
    assert await listed(auth, operator) == [(1, "file", "", "")]


async def test_rules_are_for_what_changes(database: Database) -> None:
    """A key file that was lost must not keep other models from being changed."""

    def find_problems(models: Any) -> list[Problem]:
        return [
            Problem(("models", index, "deployments", 0, "api_key_file"), "there is no such file")
            for index, model in enumerate(models)
            if getattr(model.deployments[0], "api_key_file", None)
        ]

    auth = Installation(database, rules=Rules(find_problems, tuple))
    keyed = deployment(api_key_file="/gone")
    auth.found = found(document(gpt=[keyed]))
    operator = await auth.add_person(await auth.add_organisation(), roles={"": "owner"}, operator=True)
    await apply(auth, operator, document(other=[deployment()], gpt=[keyed]))
    async with refused(ErrorKind.UNPROCESSABLE, "models[0].deployments[0].api_key_file"):
        await apply(auth, operator, document(gpt=[{**keyed, "weight": 2}]))
    await auth.close()


async def test_secrets_of_headers_are_neither_shown_nor_stored_in_plain_text(
    auth: Installation, operator: Person
) -> None:
    headers = {"x-key": SECRET, "x-place": "${PLACE}"}
    await apply(auth, operator, document(gpt=[deployment(headers=headers)]))
    shown = await in_force(auth, operator)
    assert shown["gpt"][0]["headers"] == {"x-key": HIDDEN, "x-place": "${PLACE}"}
    # What was shown may be given back, with a change beside it.
    shown["gpt"][0]["weight"] = 2
    await apply(auth, operator, document(**shown))
    (serving, *_) = [json.loads(auth.serving.feed.current.document)["models"][0]["deployments"][0]]
    assert (serving["headers"], serving["weight"]) == (headers, 2)
    changed = document(gpt=[deployment(headers={"x-key": "another"}, weight=2)])
    plan = await auth.call(operator, "PlanConfiguration", pb.PlanConfigurationRequest(document=changed))
    assert {field.name for field in plan.changes[0].fields} == {"headers.x-key", "headers.x-place"}
    stored = [row.document for row in await auth.rows(serving_configurations)]
    recorded = [record.before + record.after for record in await auth.audited("")]
    assert len(stored) == len(recorded) == 3
    assert not [text for text in (*map(repr, stored), *recorded, str(plan)) if SECRET in text or "another" in text]


async def test_who_follows_gets_the_newest_and_is_counted(auth: Installation, operator: Person) -> None:
    await in_force(auth, operator)
    context: Any = None
    request = pb.WatchServingRequest(instance="i1", service="gateway", node="n1")
    watch: Any = auth.serving.WatchServing(request, context)
    async with asyncio.timeout(60), aclosing(watch):
        first = await anext(watch)
        assert (first.revision, [model.name for model in read_document(first.document)]) == (1, ["gpt", "old"])
        for weight in (2, 3):
            await apply(auth, operator, document(gpt=[deployment(weight=weight)]))
        newest = await anext(watch)
        (model,) = read_document(newest.document)
        assert (newest.revision, model.deployments[0].weight) == (3, 3)
        await auth.serving.ReportServing(pb.ReportServingRequest(instance="i1", revision=3, problem="why"), context)
        answer = await auth.call(operator, "ListFollowers", pb.ListFollowersRequest())
        follower = pb.Follower(instance="i1", service="gateway", node="n1", version=3, problem="why")
        assert list(answer.followers) == [follower]
    assert auth.serving.feed.followers == []
    async with refused(ErrorKind.NOT_FOUND):
        await auth.serving.ReportServing(pb.ReportServingRequest(instance="i1"), context)


async def test_what_another_control_process_applies_comes_into_force_here(auth: Installation, operator: Person) -> None:
    await in_force(auth, operator)
    other = Installation(auth.database, auth.clock)
    other.found = auth.found
    await apply(other, operator, document(gpt=[deployment(weight=7)]))
    assert auth.serving.feed.current.revision == 1
    await auth.serving.feed.look()
    assert auth.serving.feed.current.revision == 2
    await other.close()


OTHER_FILE = document(third=[deployment()])


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        # The file changed while nothing ran.
        (found(OTHER_FILE), (["third"], 3, "file")),
        # It says what it said, on a node that is new here: what was applied since stays in force.
        (found(FILE), (["applied"], 2, "api")),
        # It says what is in force.
        (found(document(applied=[deployment()])), (["applied"], 2, "api")),
        # It says nothing of models.
        (found(OTHER_FILE, said=False), (["applied"], 2, "api")),
        # The node knows what is in force.
        (found(document(applied=[deployment()]), 2), (["applied"], 2, "api")),
        # Something was applied through another node while this one was away.
        (found(FILE, 1), (["applied"], 2, "api")),
        # The database was restored from a backup: the node knows a later version.
        (found(OTHER_FILE, 8), (["third"], 9, "file")),
    ],
)
async def test_the_last_change_wins_at_a_start(
    auth: Installation, operator: Person, node: Found, expected: tuple[list[str], int, str]
) -> None:
    await apply(auth, operator, document(applied=[deployment()]))
    again = Installation(auth.database, auth.clock)
    again.found = node
    assert (list(await in_force(again, operator)), *(await listed(again, operator))[0][:2]) == expected
    await again.close()


async def test_an_edited_file_is_a_version_of_nobody(auth: Installation, operator: Person) -> None:
    await in_force(auth, operator)
    await auth.serving.apply_file(OTHER_FILE)
    assert (await listed(auth, operator))[0] == (2, "file", "", "")
    (record,) = await auth.audited("", action="apply_configuration_file", target_id="2")
    assert (record.actor_kind, json.loads(record.after)["origin"]) == ("system", "file")
    with pytest.raises(Refused, match="unknown key"):
        await auth.serving.apply_file('{"models": [{"name": "a", "colour": 1}]}')


async def test_a_version_that_this_release_cannot_read_leaves_what_is_in_force(
    auth: Installation, operator: Person
) -> None:
    await in_force(auth, operator)

    def complete(models: Any) -> Models:
        raise Refused([Problem(("models", 0), "from the future")])

    auth.serving.feed._rules = Rules(lambda _models: (), complete)
    other = Installation(auth.database, auth.clock)
    other.found = auth.found
    await apply(other, operator, document(new=[deployment()]))
    await auth.serving.feed.look()
    assert [model.name for model in auth.serving.feed.current.models] == ["gpt", "old"]
    await other.close()
