"""What is taken away does not work any more a moment later, at the gateway."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from tests.harness.node import Node
from tests.harness.visitor import EFFECTIVE_S, PASSWORD, Visitor, until_answered, until_refused, visit


@dataclass(frozen=True, slots=True)
class Scene:
    """A member of a project with a session and keys, who has just used the models."""

    operator: Visitor
    user_id: str
    project_id: str
    key_id: str
    session: Visitor
    own_key: Visitor
    project_key: Visitor


async def play(operator: Visitor, name: str) -> Scene:
    """All of them cached at the gateway."""
    user_id = await operator.new_user(f"{name}@revocation.example", "developer")
    project = await operator.make("/projects", {"name": name})
    session = await operator.sign_in(f"{name}@revocation.example", project_id=project["id"])
    own = await session.make("/keys", {"name": "own", "project_id": project["id"], "owner_id": user_id})
    project_key = await operator.new_key("project's", project_id=project["id"])
    scene = Scene(
        operator,
        user_id,
        project["id"],
        own["key"]["id"],
        session,
        operator.as_other(own["secret"]),
        project_key,
    )
    for visitor in (scene.session, scene.own_key, scene.project_key):
        assert (await visitor.models()).status_code == 200
    return scene


async def revoke_key(scene: Scene) -> None:
    await scene.operator.do("POST", f"/keys/{scene.key_id}/revoke")


async def log_out(scene: Scene) -> None:
    await scene.session.do("POST", "/auth/logout", {"refresh_token": scene.session.refresh_token})


async def end_session(scene: Scene) -> None:
    await scene.operator.do("DELETE", f"/users/{scene.user_id}/sessions")


async def change_password(scene: Scene) -> None:
    other = await scene.operator.sign_in((await scene.session.admin("GET", "/me")).json()["email"])
    await other.do("PUT", "/me/password", {"current_password": PASSWORD, "new_password": f"new {PASSWORD}"})
    assert (await other.models()).status_code == 200


async def reset(scene: Scene) -> None:
    await scene.operator.do("POST", f"/users/{scene.user_id}/reset")


async def suspend(scene: Scene) -> None:
    await scene.operator.do("POST", f"/users/{scene.user_id}/suspend")


async def delete_user(scene: Scene) -> None:
    await scene.operator.do("DELETE", f"/users/{scene.user_id}")


async def remove_member(scene: Scene) -> None:
    await scene.operator.do("DELETE", f"/members/{scene.user_id}")


async def delete_project(scene: Scene) -> None:
    await scene.operator.do("DELETE", f"/projects/{scene.project_id}")


SESSION, OWN_KEY, PROJECT_KEY = "session", "own_key", "project_key"


@pytest.mark.parametrize(
    ("act", "ends"),
    [
        (revoke_key, {OWN_KEY}),
        (log_out, {SESSION}),
        (end_session, {SESSION}),
        (change_password, {SESSION}),
        (reset, {SESSION}),
        (suspend, {SESSION, OWN_KEY}),
        (delete_user, {SESSION, OWN_KEY}),
        (remove_member, {SESSION, OWN_KEY}),
        (delete_project, {SESSION, OWN_KEY, PROJECT_KEY}),
    ],
)
async def test_what_was_ended_is_refused_and_the_rest_goes_on(
    node: Node, act: Callable[[Scene], Awaitable[None]], ends: set[str]
) -> None:
    async with visit(node) as operator:
        scene = await play(operator, act.__name__)
        await act(scene)
        for name in sorted(ends):
            await until_refused(getattr(scene, name))
        for name in {SESSION, OWN_KEY, PROJECT_KEY} - ends:
            assert (await getattr(scene, name).models()).status_code == 200, name


async def test_a_suspended_user_comes_back_when_reinstated(node: Node) -> None:
    async with visit(node) as operator:
        scene = await play(operator, "reinstated")
        await suspend(scene)
        await until_refused(scene.own_key)
        refused = await operator.admin(
            "POST", "/auth/login", {"email": "reinstated@revocation.example", "password": PASSWORD}
        )
        assert refused.status_code in (401, 403)
        await scene.operator.do("POST", f"/users/{scene.user_id}/reinstate")
        # A refusal is remembered for a moment, until the gateway hears.
        await until_answered(scene.own_key, lambda answer: answer.status_code == 200)
        assert (await scene.session.models()).status_code == 401, "its session ended for good"
        again = await operator.sign_in("reinstated@revocation.example")
        assert (await again.models()).status_code == 200


async def test_another_role_means_other_permissions(node: Node) -> None:
    async with visit(node) as operator:
        scene = await play(operator, "role")
        await operator.do("PUT", f"/members/{scene.user_id}", {"role": "viewer"})
        await until_refused(scene.session)
        session = await scene.session.refresh()
        assert (await session.admin("GET", "/me")).json()["roles"] == ["viewer"]
        assert (await session.models()).status_code == 200
        assert (await session.chat()).status_code == 403
        async with asyncio.timeout(EFFECTIVE_S):
            while (await scene.own_key.chat()).status_code != 403:
                pass  # it may do no more than its owner
        assert (await scene.project_key.chat()).status_code == 200
        await operator.do("PUT", f"/members/{scene.user_id}", {"role": "developer"})
        await until_refused(session)
        assert (await (await session.refresh()).chat()).status_code == 200


async def test_a_role_that_is_edited_changes_for_all_who_have_it(node: Node) -> None:
    async with visit(node) as operator:
        role = await operator.make("/roles", {"name": "runner", "permissions": ["models:read", "models:use"]})
        robot = await operator.make("/service-accounts", {"name": "robot", "role": "runner"})
        key = await operator.new_key("robot's", owner_id=robot["id"])
        await operator.new_user("runner@revocation.example", "runner")
        session = await operator.sign_in("runner@revocation.example")
        assert (await key.models()).status_code == (await session.models()).status_code == 200
        await operator.do("PATCH", f"/roles/{role['id']}", {"permissions": ["keys:read"]})
        await until_refused(key, 403)
        await until_refused(session)
        # Of no use for models any more, and of no project.
        session = await session.refresh()
        assert (await session.models()).status_code == 403
        assert (await session.admin("GET", "/keys")).status_code == 200
        await operator.do("PATCH", f"/roles/{role['id']}", {"permissions": ["models:read"]})
        await until_answered(key, lambda answer: answer.status_code == 200)


async def test_a_key_that_is_restricted_further(node: Node) -> None:
    async with visit(node) as operator:
        made = await operator.make("/keys", {"name": "restricted"})
        key = operator.as_other(made["secret"])
        assert len((await key.models()).json()["data"]) == 2
        await operator.do("PATCH", f"/keys/{made['key']['id']}", {"models": ["all-minilm-l6-v2"]})
        await until_answered(key, lambda answer: len(answer.json()["data"]) == 1)
        await operator.do("PATCH", f"/keys/{made['key']['id']}", {"networks": ["10.0.0.0/8"]})
        await until_refused(key, 403)


async def test_a_rotated_key_and_its_successor(node: Node) -> None:
    async with visit(node) as operator:
        made = await operator.make("/keys", {"name": "rotated"})
        old = operator.as_other(made["secret"])
        assert (await old.models()).status_code == 200
        rotated = await operator.make(f"/keys/{made['key']['id']}/rotate", {"overlap_s": 0})
        assert rotated["key"]["rotated_from"] == made["key"]["id"]
        await until_refused(old)
        assert (await operator.as_other(rotated["secret"]).models()).status_code == 200


async def test_twenty_keys_revoked_in_a_row(node: Node) -> None:
    """The time between the answer to a revocation and the first refusal."""
    async with visit(node) as operator:
        took = []
        for number in range(20):
            made = await operator.make("/keys", {"name": f"key {number}"})
            key = operator.as_other(made["secret"])
            assert (await key.models()).status_code == 200
            await operator.do("POST", f"/keys/{made['key']['id']}/revoke")
            took.append(await until_refused(key))
        assert max(took) < EFFECTIVE_S
        assert sorted(took)[10] < EFFECTIVE_S / 4, "told, not found out"
