"""The second factor: enrolled with the password, asked for after it, each code once."""

import asyncio

import pytest

from helixflow.auth.login import CHALLENGE_ATTEMPTS, CHALLENGE_LIFE_S
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import sessions_pb2 as pb
from helixflow.storage.schema import accounts, recovery_codes, sessions
from tests.harness.auth import refused
from tests.harness.sessions import PASSWORD, WRONG, SignIns


async def verify(door: SignIns, challenge: str, code: str) -> pb.LoginResponse:
    answer: pb.LoginResponse = await door.ask(None, "VerifyMfa", pb.VerifyMfaRequest(challenge=challenge, code=code))
    return answer


async def renew(door: SignIns, token: str, code: str, password: str = PASSWORD) -> pb.RecoveryCodes:
    request = pb.RenewRecoveryCodesRequest(current_password=password, code=code)
    answer: pb.RecoveryCodes = await door.ask(token, "RenewRecoveryCodes", request)
    return answer


async def test_a_sign_in_with_a_second_factor(door: SignIns) -> None:
    ada = await door.add_account()
    secret, codes = await door.turn_on_mfa((await door.login(ada.email)).access_token)
    assert len(set(codes)) == 10
    first = await door.login(ada.email)
    assert first.challenge.startswith("hfc_") and not (first.access_token or first.refresh_token or first.session_id)
    answer = await verify(door, first.challenge, door.code(secret))
    assert answer.access_token and answer.refresh_token and not answer.challenge
    (session,) = await door.rows(sessions, id=answer.session_id)
    assert session.method == "password+totp"
    async with refused(ErrorKind.INVALID_TOKEN):
        await verify(door, first.challenge, door.code(secret, 1))
    # The same code again, in a new challenge.
    second = await door.login(ada.email)
    async with refused(ErrorKind.INVALID_CREDENTIALS):
        await verify(door, second.challenge, door.code(secret))
    assert await verify(door, second.challenge, door.code(secret, 1))


async def test_a_recovery_code_works_once_however_it_is_typed(door: SignIns) -> None:
    ada = await door.add_account()
    secret, codes = await door.turn_on_mfa((await door.login(ada.email)).access_token)
    answer = await verify(door, (await door.login(ada.email)).challenge, f" {codes[0].upper().replace('-', ' ')} ")
    (session,) = await door.rows(sessions, id=answer.session_id)
    assert session.method == "password+recovery_code"
    async with refused(ErrorKind.INVALID_CREDENTIALS):
        await verify(door, (await door.login(ada.email)).challenge, codes[0])
    renewed = await renew(door, answer.access_token, door.code(secret))
    assert set(renewed.codes).isdisjoint(codes) and len(renewed.codes) == 10
    challenge = (await door.login(ada.email)).challenge
    async with refused(ErrorKind.INVALID_CREDENTIALS):
        await verify(door, challenge, codes[1])
    assert await verify(door, challenge, renewed.codes[0])


async def test_a_challenge_ends_after_five_minutes(door: SignIns) -> None:
    ada = await door.add_account()
    secret, _ = await door.turn_on_mfa((await door.login(ada.email)).access_token)
    challenge = (await door.login(ada.email)).challenge
    door.clock.advance(CHALLENGE_LIFE_S)
    async with refused(ErrorKind.INVALID_TOKEN):
        await verify(door, challenge, door.code(secret))


async def test_guessing_codes_ends_the_challenge_and_is_not_forgiven_by_the_password(door: SignIns) -> None:
    ada = await door.add_account()
    secret, _ = await door.turn_on_mfa((await door.login(ada.email)).access_token)
    challenge = (await door.login(ada.email)).challenge
    for _ in range(CHALLENGE_ATTEMPTS):
        async with refused(ErrorKind.INVALID_CREDENTIALS):
            await verify(door, challenge, "000000")
    async with refused(ErrorKind.INVALID_TOKEN):
        await verify(door, challenge, door.code(secret))
    with pytest.raises(HelixError) as caught:
        await door.login(ada.email)
    assert caught.value.kind is ErrorKind.TOO_MANY_ATTEMPTS
    door.clock.advance(2)
    challenge = (await door.login(ada.email)).challenge
    async with refused(ErrorKind.INVALID_CREDENTIALS):
        await verify(door, challenge, "000000")
    with pytest.raises(HelixError) as caught:
        await verify(door, challenge, door.code(secret))
    assert caught.value.kind is ErrorKind.TOO_MANY_ATTEMPTS and caught.value.retry_after_s == 2
    door.clock.advance(30)
    assert (await verify(door, challenge, door.code(secret))).access_token


async def test_of_two_that_bring_the_same_code_one_gets_in(door: SignIns) -> None:
    ada = await door.add_account()
    secret, codes = await door.turn_on_mfa((await door.login(ada.email)).access_token)
    for code in (door.code(secret), codes[0]):
        challenges = [(await door.login(ada.email)).challenge for _ in range(2)]
        outcomes = await asyncio.gather(*(verify(door, c, code) for c in challenges), return_exceptions=True)
        assert sum(not isinstance(outcome, HelixError) for outcome in outcomes) == 1


async def test_the_secret_counts_only_once_confirmed_and_is_sealed(door: SignIns) -> None:
    ada = await door.add_account()
    token = (await door.login(ada.email)).access_token
    async with refused(ErrorKind.INVALID_CREDENTIALS, "current_password"):
        await door.ask(token, "EnrolMfa", pb.EnrolMfaRequest(current_password=WRONG))
    enrolled = await door.ask(token, "EnrolMfa", pb.EnrolMfaRequest(current_password=PASSWORD))
    assert enrolled.uri == (
        f"otpauth://totp/HelixFlow%3Aada%40example.com?secret={enrolled.secret}&issuer=HelixFlow"
        "&algorithm=SHA1&digits=6&period=30"
    )
    assert (await door.login(ada.email)).access_token
    async with refused(ErrorKind.INVALID_CREDENTIALS, "code"):
        await door.ask(token, "ConfirmMfa", pb.ConfirmMfaRequest(code="000000"))
    assert (await door.login(ada.email)).access_token
    (account,) = await door.rows(accounts, id=ada.id)
    assert account.totp_confirmed_at is None and enrolled.secret.encode() not in account.totp_secret
    log = "".join(f"{record.before}{record.after}" for record in await door.audited(ada.organisation_id))
    assert enrolled.secret not in log


async def test_new_recovery_codes_take_as_much_as_turning_it_off(door: SignIns) -> None:
    ada = await door.add_account()
    token = (await door.login(ada.email)).access_token
    secret, codes = await door.turn_on_mfa(token)
    async with refused(ErrorKind.INVALID_CREDENTIALS, "current_password"):
        await renew(door, token, door.code(secret), WRONG)
    for wrong in ("", "000000", "aaaa-bbbb-cccc"):
        async with refused(ErrorKind.INVALID_CREDENTIALS, "code"):
            await renew(door, token, wrong)
    renewed = await renew(door, token, codes[0])
    assert set(renewed.codes).isdisjoint(codes) and len(await door.rows(recovery_codes)) == 10
    async with refused(ErrorKind.INVALID_CREDENTIALS, "code"):
        await renew(door, token, codes[1])
    # Guessed as often as a password may be.
    async with refused(ErrorKind.TOO_MANY_ATTEMPTS):
        await renew(door, token, renewed.codes[0])
    outcomes = [r.outcome for r in await door.audited(ada.organisation_id, action="renew_recovery_codes")]
    assert outcomes == ["denied"] * 4 + ["done", "denied"]


async def test_turning_it_off_takes_password_and_code(door: SignIns) -> None:
    ada = await door.add_account()
    token = (await door.login(ada.email)).access_token
    secret, codes = await door.turn_on_mfa(token)
    for request in (
        pb.DisableMfaRequest(current_password=WRONG, code=door.code(secret)),
        pb.DisableMfaRequest(current_password=PASSWORD, code="000000"),
    ):
        with pytest.raises(HelixError) as caught:
            await door.ask(token, "DisableMfa", request)
        assert caught.value.kind is ErrorKind.INVALID_CREDENTIALS
    async with refused(ErrorKind.CONFLICT):
        await door.ask(token, "EnrolMfa", pb.EnrolMfaRequest(current_password=PASSWORD))
    await door.ask(token, "DisableMfa", pb.DisableMfaRequest(current_password=PASSWORD, code=codes[3]))
    assert (await door.login(ada.email)).access_token
    assert await door.rows(recovery_codes) == []
    async with refused(ErrorKind.CONFLICT):
        await renew(door, token, codes[4])
    actions = [(record.action, record.outcome) for record in await door.audited(ada.organisation_id)]
    assert ("confirm_mfa", "done") in actions and ("disable_mfa", "denied") in actions
    assert actions[-2:] == [("disable_mfa", "done"), ("login", "done")]
