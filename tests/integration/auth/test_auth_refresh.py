"""Refresh tokens: each works once, a used one ends its session, whoever brings it."""

import asyncio

import msgspec
import pytest

from helixflow.auth.sessions import REFRESH_LIFE_S, SESSION_LIFE_S
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.keys import CHALLENGE_PREFIX, REFRESH_PREFIX, TOKEN_PREFIX, generate_key
from helixflow.rpc.generated.auth_v1 import admin_pb2, identity_pb2
from helixflow.rpc.generated.auth_v1 import sessions_pb2 as pb
from helixflow.storage.schema import sessions
from tests.harness.auth import refused
from tests.harness.sessions import PASSWORD, SignIns

SESSION = identity_pb2.CHANGE_KIND_SESSION


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
    door.clock.advance(answer.refresh_expires_in - 60)
    answer = await door.refresh(answer.refresh_token)
    # Nor does an access token outlive its session.
    assert answer.expires_in == answer.refresh_expires_in == 60
    assert door.tokens.read(answer.access_token).exp == began + SESSION_LIFE_S
    door.clock.advance(60)
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.refresh(answer.refresh_token)
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.ask(answer.access_token, "GetSelf", pb.GetSelfRequest())


async def test_a_refresh_looks_at_the_roles_of_now(door: SignIns) -> None:
    ada = await door.add_account(roles={"": "viewer"})
    first = await door.login(ada.email)
    project = await door.add_project(ada.organisation_id)
    await door.add_membership(ada.id, ada.organisation_id, "developer", project)
    claims = door.tokens.read((await door.refresh(first.refresh_token, project_id=project)).access_token)
    assert claims.project == project and "models:use" in claims.scope.split() and claims.roles == ["viewer"]


async def test_who_goes_to_another_organisation_has_a_new_session_there(door: SignIns) -> None:
    ada = await door.add_account()
    other, strange = await door.add_organisation("Other"), await door.add_organisation("Strange")
    await door.add_membership(ada.id, other, "viewer")
    first = await door.login(ada.email)
    for asked in ({"organisation_id": strange}, {"project_id": "proj_unknown"}):
        with pytest.raises(HelixError) as caught:
            await door.refresh(first.refresh_token, **asked)
        assert caught.value.kind is ErrorKind.NOT_FOUND
    # The token was not used up by that.
    door.clock.advance(3600)
    moved = await door.refresh(first.refresh_token, organisation_id=other)
    assert moved.session_id != first.session_id
    assert door.tokens.read(moved.access_token).org == other
    assert (SESSION, first.session_id, "") in await door.told()
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.ask(first.access_token, "GetSelf", pb.GetSelfRequest())
    left, entered = await session_row(door, first.session_id), await session_row(door, moved.session_id)
    assert (left.organisation_id, left.end_reason) == (ada.organisation_id, "moved")
    assert (entered.organisation_id, entered.method, entered.last_until) == (other, left.method, left.last_until)
    (there,) = await door.audited(other)
    assert (there.action, there.actor_id, there.target_id) == ("login", ada.id, moved.session_id)
    ended, at_home = (await door.audited(ada.organisation_id))[-2:]
    assert (ended.action, ended.target_id) == ("refresh", first.session_id) and "moved" in ended.after
    assert (at_home.action, at_home.target_id) == ("login", moved.session_id)
    again = await door.refresh(moved.refresh_token)
    assert (again.session_id, door.tokens.read(again.access_token).org) == (moved.session_id, other)


async def test_nobody_escapes_an_organisation_by_going_to_another_and_back(door: SignIns) -> None:
    ada = await door.add_account()
    eve = await door.add_account("eve@example.com", organisation_id=ada.organisation_id)
    other = await door.add_organisation("Other")
    await door.add_membership(eve.id, other, "viewer")
    await door.call(ada, "EndUserSessions", admin_pb2.EndUserSessionsRequest(user_id=eve.id))
    stolen = await door.login(eve.email)
    hidden = await door.refresh(stolen.refresh_token, organisation_id=other)
    apart = await door.login(eve.email, organisation_id=other)
    assert (await door.call(ada, "ListUserSessions", admin_pb2.ListUserSessionsRequest(user_id=eve.id))).sessions == []
    ended = await door.call(ada, "EndUserSessions", admin_pb2.EndUserSessionsRequest(user_id=eve.id))
    assert ended.ended == 0
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.refresh(hidden.refresh_token, organisation_id=ada.organisation_id)
    for token in (stolen.access_token, hidden.access_token):
        async with refused(ErrorKind.INVALID_TOKEN):
            await door.ask(token, "GetSelf", pb.GetSelfRequest())
    # What never was there is none of their business.
    assert await door.refresh(apart.refresh_token)


async def test_a_token_that_comes_again_ends_what_followed_elsewhere(door: SignIns) -> None:
    ada = await door.add_account()
    first_other, second_other = await door.add_organisation("Other"), await door.add_organisation("Third")
    for organisation_id in (first_other, second_other):
        await door.add_membership(ada.id, organisation_id, "viewer")
    first = await door.login(ada.email, organisation_id=first_other)
    moved = await door.refresh(first.refresh_token, organisation_id=second_other)
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.refresh(first.refresh_token)
    assert (await session_row(door, first.session_id)).end_reason == "moved"
    assert (await session_row(door, moved.session_id)).end_reason == "reused"
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.refresh(moved.refresh_token)
    for chain in (ada.organisation_id, first_other, second_other):
        (alarm,) = await door.audited(chain, action="refresh_token_reused")
        assert alarm.target_id == first.session_id and ada.id in alarm.after


async def test_a_token_counts_only_in_the_organisation_of_its_session(door: SignIns) -> None:
    ada = await door.add_account()
    other = await door.add_organisation("Other")
    await door.add_membership(ada.id, other, "owner")
    claims = msgspec.json.decode(ada.credential)
    forged = msgspec.json.encode({**claims, "org": other}).decode()
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.call(forged, "GetOrganisation", admin_pb2.GetRequest(id=other))
    assert (await door.call(ada, "GetOrganisation", admin_pb2.GetRequest(id=ada.organisation_id))).id


async def test_what_cannot_work_waits_for_nobody_who_writes(door: SignIns) -> None:
    ada = await door.add_account()
    first = await door.login(ada.email)
    await door.refresh(first.refresh_token)
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.refresh(first.refresh_token)
    rubbish = [first.refresh_token, generate_key(REFRESH_PREFIX), first.refresh_token[:-1] + "!", "hfr_", ""]
    async with door.system(), asyncio.timeout(30):
        for token in rubbish:
            async with refused(ErrorKind.INVALID_TOKEN):
                await door.refresh(token)
            await door.ask(None, "Logout", pb.LogoutRequest(refresh_token=token))
        for challenge in (generate_key(CHALLENGE_PREFIX), "hfc_", ""):
            async with refused(ErrorKind.INVALID_TOKEN):
                await door.ask(None, "VerifyMfa", pb.VerifyMfaRequest(challenge=challenge, code="000000"))
        for token in (generate_key(TOKEN_PREFIX), "hft_"):
            async with refused(ErrorKind.INVALID_TOKEN, "token"):
                await door.ask(None, "RedeemToken", pb.RedeemTokenRequest(token=token, password=PASSWORD))


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
