"""What people see of themselves, and do with their own password and sessions."""

from typing import Any

import pytest

from helixflow.core.errors import ErrorKind
from helixflow.rpc.generated.auth_v1 import identity_pb2
from helixflow.rpc.generated.auth_v1 import sessions_pb2 as pb
from helixflow.storage.schema import sessions
from tests.harness.auth import refused
from tests.harness.sessions import PASSWORD, WRONG, SignIns

NEW = "yet another pass phrase"


async def test_changing_the_password_ends_the_other_sessions_only(door: SignIns) -> None:
    ada = await door.add_account()
    mine, other = await door.login(ada.email), await door.login(ada.email)
    request = pb.ChangePasswordRequest(current_password=PASSWORD, new_password=NEW)
    await door.ask(mine.access_token, "ChangePassword", request)
    assert (await door.ask(mine.access_token, "GetSelf", pb.GetSelfRequest())).id == ada.id
    assert await door.refresh(mine.refresh_token)
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.refresh(other.refresh_token)
    (ended,) = await door.rows(sessions, id=other.session_id)
    assert ended.end_reason == "password"
    assert (identity_pb2.CHANGE_KIND_SESSION, other.session_id, "") in await door.told()
    async with refused(ErrorKind.INVALID_CREDENTIALS):
        await door.login(ada.email)
    assert await door.login(ada.email, NEW)


async def test_a_stolen_token_does_not_change_the_password(door: SignIns) -> None:
    ada = await door.add_account()
    token = (await door.login(ada.email)).access_token
    for _ in range(5):
        async with refused(ErrorKind.INVALID_CREDENTIALS, "current_password"):
            await door.ask(token, "ChangePassword", pb.ChangePasswordRequest(current_password=WRONG, new_password=NEW))
    async with refused(ErrorKind.TOO_MANY_ATTEMPTS):
        await door.ask(token, "ChangePassword", pb.ChangePasswordRequest(current_password=PASSWORD, new_password=NEW))


async def test_a_session_that_ends_meanwhile_changes_nothing(door: SignIns, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = await door.add_account()
    owner = await door.login(ada.email)
    verify = door.passwords.verify

    async def slow(*arguments: Any) -> bool:
        await door.ask(owner.access_token, "EndOwnSession", pb.EndOwnSessionRequest(session_id=thief.session_id))
        return await verify(*arguments)

    monkeypatch.setattr(door.passwords, "verify", slow)
    for rpc, request in (
        ("ChangePassword", pb.ChangePasswordRequest(current_password=PASSWORD, new_password=NEW)),
        ("EnrolMfa", pb.EnrolMfaRequest(current_password=PASSWORD)),
    ):
        thief = await door.enter(ada)
        async with refused(ErrorKind.INVALID_TOKEN):
            await door.ask(thief.access_token, rpc, request)
    monkeypatch.undo()
    assert (await door.login(ada.email)).access_token


async def test_a_bad_new_password_changes_nothing_and_counts_for_nothing(door: SignIns) -> None:
    ada = await door.add_account()
    token = (await door.login(ada.email)).access_token
    for bad in ("", "short", "Password123!!", "ada@example.com", "x" * 1025) * 2:
        async with refused(ErrorKind.UNPROCESSABLE, "new_password"):
            await door.ask(
                token, "ChangePassword", pb.ChangePasswordRequest(current_password=PASSWORD, new_password=bad)
            )
    assert await door.login(ada.email)


async def test_keys_are_no_people(door: SignIns) -> None:
    organisation_id = await door.add_organisation()
    project = await door.add_project(organisation_id)
    key_id, key = await door.add_key(organisation_id, project, scopes=["models:use"])
    me = await door.ask(key, "GetSelf", pb.GetSelfRequest())
    assert (me.kind, me.id, me.email, me.project_id) == ("key", key_id, "", project)
    assert [(held.project_id, list(held.permissions)) for held in me.projects] == [(project, ["models:use"])]
    async with refused(ErrorKind.PERMISSION_DENIED):
        await door.ask(key, "ChangePassword", pb.ChangePasswordRequest(current_password=PASSWORD, new_password=NEW))
    assert list((await door.ask(key, "ListOwnSessions", pb.ListOwnSessionsRequest())).sessions) == []


async def test_who_i_am_and_where(door: SignIns) -> None:
    ada = await door.add_account(roles={"": "viewer"})
    other = await door.add_organisation("Other")
    project = await door.add_project(ada.organisation_id)
    await door.add_membership(ada.id, other, "owner")
    await door.add_membership(ada.id, ada.organisation_id, "developer", project)
    me = await door.ask((await door.login(ada.email)).access_token, "GetSelf", pb.GetSelfRequest())
    assert (me.name, me.email, me.mfa_enabled, me.operator, list(me.roles)) == (
        "Somebody",
        ada.email,
        False,
        False,
        ["viewer"],
    )
    assert {found.organisation_id: found.name for found in me.organisations} == {
        ada.organisation_id: "Acme",
        other: "Other",
    }
    assert "models:use" not in me.permissions and "models:use" in me.projects[0].permissions


async def test_ones_own_sessions(door: SignIns) -> None:
    ada, eve = await door.add_account(), await door.add_account("eve@example.com")
    first = await door.login(ada.email, address="2001:db8::1")
    door.clock.advance(1)
    second = await door.login(ada.email)
    theirs = await door.login(eve.email)
    listed = (await door.ask(second.access_token, "ListOwnSessions", pb.ListOwnSessionsRequest())).sessions
    mine = [session for session in listed if session.id in (first.session_id, second.session_id)]
    assert [(session.id, session.current, session.address) for session in mine] == [
        (second.session_id, True, "192.0.2.1"),
        (first.session_id, False, "2001:db8::1"),
    ]
    assert {session.account_id for session in listed} == {ada.id}
    await door.ask(second.access_token, "EndOwnSession", pb.EndOwnSessionRequest(session_id=first.session_id))
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.refresh(first.refresh_token)
    for gone in (first.session_id, theirs.session_id, "ses_unknown"):
        async with refused(ErrorKind.NOT_FOUND, "session_id"):
            await door.ask(second.access_token, "EndOwnSession", pb.EndOwnSessionRequest(session_id=gone))
    assert await door.refresh(theirs.refresh_token)
