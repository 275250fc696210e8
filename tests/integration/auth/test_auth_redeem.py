"""Invitations and resets: redeemed once, by who has the token, and no way into somebody else's account."""

import asyncio

import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import admin_pb2, identity_pb2
from helixflow.rpc.generated.auth_v1 import sessions_pb2 as pb
from helixflow.storage.schema import accounts, memberships, sessions
from tests.harness.auth import TOKEN_LIFE_S, Person, refused
from tests.harness.sessions import PASSWORD, WRONG, SignIns

NEW = "yet another pass phrase"


async def invite(
    door: SignIns, ada: Person, email: str = "bob@example.com", role: str = "developer", project: str = ""
) -> str:
    credential = await door.sign_in(ada.id, ada.organisation_id)
    request = admin_pb2.InviteUserRequest(email=email, role=role, project_id=project)
    return str((await door.call(credential, "InviteUser", request)).token)


async def redeem(door: SignIns, token: str, password: str = NEW, name: str = "") -> pb.RedeemTokenResponse:
    request = pb.RedeemTokenRequest(token=token, password=password, name=name)
    answer: pb.RedeemTokenResponse = await door.ask(None, "RedeemToken", request)
    return answer


async def test_an_invitation_makes_an_account(door: SignIns) -> None:
    ada = await door.add_account()
    token = await invite(door, ada)
    answer = await redeem(door, token, name="Bob Ω")
    (account,) = await door.rows(accounts, id=answer.account_id)
    assert (account.email, account.name, account.home_organisation_id) == (
        "bob@example.com",
        "Bob Ω",
        ada.organisation_id,
    )
    assert answer.email == "bob@example.com" and not account.operator
    claims = door.tokens.read((await door.login("bob@example.com", NEW)).access_token)
    assert claims.roles == ["developer"] and claims.name == "Bob Ω"
    record = (await door.audited(ada.organisation_id, action="redeem_token"))[0]
    assert (record.actor_id, record.target_id) == (answer.account_id, answer.account_id)
    assert token not in record.after and NEW not in record.after


@pytest.mark.parametrize("flaw", ["", "hft_nonsense", "hft_" + "x" * 46])
async def test_what_is_no_token_is_refused(door: SignIns, flaw: str) -> None:
    async with refused(ErrorKind.INVALID_TOKEN, "token"):
        await redeem(door, flaw)


async def test_a_token_is_redeemed_once_and_in_time(door: SignIns) -> None:
    ada = await door.add_account()
    token, late = await invite(door, ada), await invite(door, ada, "late@example.com")
    await redeem(door, token)
    door.clock.advance(TOKEN_LIFE_S)
    for spent in (token, late):
        async with refused(ErrorKind.INVALID_TOKEN, "token"):
            await redeem(door, spent)


async def test_of_two_that_redeem_at_once_one_does(door: SignIns) -> None:
    ada = await door.add_account()
    token = await invite(door, ada)
    outcomes = await asyncio.gather(*(redeem(door, token, f"{NEW} {n}") for n in range(3)), return_exceptions=True)
    errors = [outcome.kind for outcome in outcomes if isinstance(outcome, HelixError)]
    assert errors == [ErrorKind.INVALID_TOKEN] * 2
    assert len(await door.rows(accounts, email="bob@example.com")) == 1


async def test_two_invitations_of_a_new_email_make_one_account(door: SignIns) -> None:
    ada, eve = await door.add_account(), await door.add_account("eve@example.com")
    tokens = [await invite(door, ada), await invite(door, eve, "BOB@example.com")]
    outcomes = await asyncio.gather(*(redeem(door, token) for token in tokens), return_exceptions=True)
    errors = [outcome.kind for outcome in outcomes if isinstance(outcome, HelixError)]
    assert errors == [ErrorKind.CONFLICT]
    (account,) = await door.rows(accounts, email_key="bob@example.com")
    # The other one still works, with the password.
    left = tokens[0] if isinstance(outcomes[0], HelixError) else tokens[1]
    assert (await redeem(door, left)).account_id == account.id


async def test_an_account_joins_with_its_password_only(door: SignIns) -> None:
    ada, eve = await door.add_account(), await door.add_account("eve@example.com")
    project = await door.add_project(eve.organisation_id)
    token = await invite(door, eve, ada.email, "developer", project)
    for password in (NEW, ""):
        async with refused(ErrorKind.INVALID_CREDENTIALS):
            await redeem(door, token, password)
    assert (await redeem(door, token, PASSWORD, "Another name")).account_id == ada.id
    (joined,) = await door.rows(memberships, account_id=ada.id, organisation_id=eve.organisation_id)
    assert (joined.project_id, joined.role) == (project, "developer")
    (account,) = await door.rows(accounts, id=ada.id)
    assert (account.name, account.home_organisation_id) == ("Somebody", ada.organisation_id)
    assert (identity_pb2.CHANGE_KIND_OWNER, ada.id, eve.organisation_id) in await door.told()
    assert (await door.login(ada.email, organisation_id=eve.organisation_id)).access_token


async def test_who_invites_does_not_get_into_an_account_without_a_password(door: SignIns) -> None:
    await door.add_account("bob@example.com", password=False)
    eve = await door.add_account("eve@example.com")
    token = await invite(door, eve)
    async with refused(ErrorKind.INVALID_CREDENTIALS):
        await redeem(door, token)
    async with refused(ErrorKind.INVALID_CREDENTIALS):
        await door.login("bob@example.com", NEW)


async def test_guessing_the_password_by_an_invitation_is_locked_out_too(door: SignIns) -> None:
    ada, eve = await door.add_account(), await door.add_account("eve@example.com")
    token = await invite(door, eve, ada.email)
    for _ in range(5):
        async with refused(ErrorKind.INVALID_CREDENTIALS):
            await redeem(door, token, WRONG)
    for attempt in (redeem(door, token, PASSWORD), door.login(ada.email)):
        async with refused(ErrorKind.TOO_MANY_ATTEMPTS):
            await attempt


async def test_a_role_or_place_that_is_gone(door: SignIns) -> None:
    ada = await door.add_account()
    token = await invite(door, ada)
    await door.rename_role_of_invitations("gone")
    async with refused(ErrorKind.CONFLICT):
        await redeem(door, token)
    token = await invite(door, ada, "carol@example.com")
    await door.delete_organisation(ada.organisation_id)
    async with refused(ErrorKind.INVALID_TOKEN, "token"):
        await redeem(door, token)
    assert len(await door.rows(accounts)) == 1


async def test_a_bad_password_does_not_use_the_token_up(door: SignIns) -> None:
    ada = await door.add_account()
    token = await invite(door, ada)
    for password in ("short", "password12345", "bob@example.com"):
        async with refused(ErrorKind.UNPROCESSABLE, "password"):
            await redeem(door, token, password)
    async with refused(ErrorKind.UNPROCESSABLE, "name"):
        await redeem(door, token, name="a\nb")
    assert await redeem(door, token)


async def test_a_reset_sets_the_password_and_ends_what_was(door: SignIns) -> None:
    ada, bob = await door.add_account(), None
    bob = await door.add_account("bob@example.com", organisation_id=ada.organisation_id, roles={"": "viewer"})
    before = await door.login(bob.email)
    for _ in range(5):
        async with refused(ErrorKind.INVALID_CREDENTIALS):
            await door.login(bob.email, WRONG)
    reset = await door.call(ada, "ResetUser", admin_pb2.ChangeRequest(id=bob.id))
    door.clock.advance(2)
    async with refused(ErrorKind.INVALID_CREDENTIALS):
        await door.login(bob.email)
    assert (await redeem(door, reset.token)).account_id == bob.id
    assert (await door.login(bob.email, NEW)).access_token
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.refresh(before.refresh_token)
    async with refused(ErrorKind.INVALID_TOKEN, "token"):
        await redeem(door, reset.token)
    (ended,) = await door.rows(sessions, id=before.session_id)
    assert ended.ended_at is not None
