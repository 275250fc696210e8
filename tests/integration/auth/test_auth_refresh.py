"""Refresh tokens: each works once, a used one ends its session, whoever brings it."""

import asyncio

import pytest

from helixflow.auth.sessions import REFRESH_LIFE_S, SESSION_LIFE_S
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import identity_pb2
from helixflow.rpc.generated.auth_v1 import sessions_pb2 as pb
from helixflow.storage.schema import sessions
from tests.harness.auth import refused
from tests.harness.sessions import SignIns

SESSION, OWNER = identity_pb2.CHANGE_KIND_SESSION, identity_pb2.CHANGE_KIND_OWNER


async def session_row(door: SignIns, session_id: str):
    (row,) = await door.rows(sessions, id=session_id)
    return row


async def test_tokens_follow_one_another_in_one_session(door: SignIns) -> None:
    ada = await door.add_account()
    first = await door.login(ada.email)
    door.clock.advance(3600)
    second = await door.refresh(first.refresh_token)
    assert second.session_id == first.session_id
    assert len({first.refresh_token, second.refresh_token, first.access_token, second.access_token}) == 4
    assert door.tokens.read(second.access_token).iat == door.now
    assert await door.refresh(second.refresh_token)


async def test_a_token_that_comes_again_ends_its_session(door: SignIns) -> None:
    ada = await door.add_account()
    first, other = await door.login(ada.email), await door.login(ada.email)
    second = await door.refresh(first.refresh_token)
    for token in (first.refresh_token, second.refresh_token, first.refresh_token):
        async with refused(ErrorKind.INVALID_TOKEN):
            await door.refresh(token)
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.ask(second.access_token, "GetSelf", pb.GetSelfRequest())
    assert (await session_row(door, first.session_id)).end_reason == "reused"
    assert (SESSION, first.session_id, "") in await door.told()
    (alarm,) = await door.audited(ada.organisation_id, action="refresh_token_reused")
    assert alarm.target_id == first.session_id and ada.id in alarm.after
    assert "hfr_" not in alarm.after
    assert await door.refresh(other.refresh_token)


async def test_of_two_refreshes_at_once_one_wins_and_the_session_ends(door: SignIns) -> None:
    ada = await door.add_account()
    first = await door.login(ada.email)
    outcomes = await asyncio.gather(*(door.refresh(first.refresh_token) for _ in range(4)), return_exceptions=True)
    won = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    lost = [outcome for outcome in outcomes if isinstance(outcome, HelixError)]
    assert len(won) == 1 and {error.kind for error in lost} == {ErrorKind.INVALID_TOKEN} and len(lost) == 3
    assert (await session_row(door, first.session_id)).end_reason == "reused"
    assert len(await door.audited(ada.organisation_id, action="refresh_token_reused")) == 1
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.refresh(won[0].refresh_token)


async def test_a_day_without_refresh_ends_a_session_and_a_month_ends_any(door: SignIns) -> None:
    ada = await door.add_account()
    idle = await door.login(ada.email)
    door.clock.advance(REFRESH_LIFE_S)
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.refresh(idle.refresh_token)
    answer = await door.login(ada.email)
    began = door.now
    while door.now + REFRESH_LIFE_S - 1 < began + SESSION_LIFE_S:
        door.clock.advance(REFRESH_LIFE_S - 1)
        answer = await door.refresh(answer.refresh_token)
    assert answer.refresh_expires_in == began + SESSION_LIFE_S - door.now < REFRESH_LIFE_S
    door.clock.advance(answer.refresh_expires_in)
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.refresh(answer.refresh_token)


async def test_a_refresh_looks_at_the_roles_of_now(door: SignIns) -> None:
    ada = await door.add_account(roles={"": "viewer"})
    first = await door.login(ada.email)
    project = await door.add_project(ada.organisation_id)
    await door.add_membership(ada.id, ada.organisation_id, "developer", project)
    claims = door.tokens.read((await door.refresh(first.refresh_token, project_id=project)).access_token)
    assert claims.project == project and "models:use" in claims.scope.split() and claims.roles == ["viewer"]


async def test_a_session_moves_to_another_organisation(door: SignIns) -> None:
    ada = await door.add_account()
    other, strange = await door.add_organisation("Other"), await door.add_organisation("Strange")
    await door.add_membership(ada.id, other, "viewer")
    first = await door.login(ada.email)
    for asked in ({"organisation_id": strange}, {"project_id": "proj_unknown"}):
        with pytest.raises(HelixError) as caught:
            await door.refresh(first.refresh_token, **asked)
        assert caught.value.kind is ErrorKind.NOT_FOUND
    # The token was not used up by that.
    moved = await door.refresh(first.refresh_token, organisation_id=other)
    assert moved.session_id == first.session_id
    assert door.tokens.read(moved.access_token).org == other
    # The tokens that are left behind end: nobody there would find their session.
    assert (OWNER, ada.id, ada.organisation_id) in await door.told()
    again = await door.refresh(moved.refresh_token)
    assert door.tokens.read(again.access_token).org == other


@pytest.mark.parametrize("values", [{"suspended_at": 1}, {"deleted_at": 1}])
async def test_an_account_that_may_not_sign_in_may_not_refresh(door: SignIns, values: dict[str, int]) -> None:
    ada = await door.add_account()
    first = await door.login(ada.email)
    await door.set(ada, **values)
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.refresh(first.refresh_token)


async def test_logout_ends_the_session_at_once_and_says_nothing_of_others(door: SignIns) -> None:
    ada = await door.add_account()
    answer = await door.login(ada.email)
    for token in (answer.refresh_token, answer.refresh_token, "hfr_" + "x" * 46, "", "nonsense"):
        await door.ask(None, "Logout", pb.LogoutRequest(refresh_token=token))
    assert (await session_row(door, answer.session_id)).end_reason == "logout"
    assert (await door.told()).count((SESSION, answer.session_id, "")) == 1
    assert len(await door.audited(ada.organisation_id, action="logout")) == 1
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.refresh(answer.refresh_token)
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.ask(answer.access_token, "GetSelf", pb.GetSelfRequest())
