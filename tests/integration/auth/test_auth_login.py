"""Login with a password: who gets in, where, with which token, and what everybody else is told."""

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import load_der_public_key

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import INSTALLATION_PERMISSIONS, ROLES
from helixflow.rpc.generated.auth_v1 import sessions_pb2 as pb
from helixflow.storage.schema import accounts, refresh_tokens, sessions, signing_keys
from tests.harness.auth import refused
from tests.harness.sessions import ADDRESS, AUDIENCE, ISSUER, PASSWORD, WRONG, SignIns


async def test_the_access_token_says_who_where_and_what(door: SignIns) -> None:
    ada = await door.add_account()
    project = await door.add_project(ada.organisation_id)
    answer = await door.login("ADA@example.com")
    (key,) = await door.rows(signing_keys)
    # An independent reader.
    header = jwt.get_unverified_header(answer.access_token)
    claims = jwt.decode(
        answer.access_token,
        load_der_public_key(key.public_key),
        algorithms=["RS256"],
        audience=AUDIENCE,
        issuer=ISSUER,
        options={"verify_exp": False, "verify_nbf": False, "verify_iat": False},
    )
    assert header == {"alg": "RS256", "typ": "at+jwt", "kid": key.kid}
    assert (claims["sub"], claims["org"], claims["project"]) == (ada.id, ada.organisation_id, project)
    assert (claims["iat"], claims["nbf"], claims["exp"]) == (door.now, door.now, door.now + 3600)
    assert claims["roles"] == ["owner"] and claims["sid"] == answer.session_id and claims["jti"]
    assert set(claims["scope"].split()) == {permission.value for permission in ROLES["owner"]}
    assert (answer.expires_in, answer.refresh_expires_in, answer.challenge) == (3600, 86_400, "")
    assert answer.refresh_token.startswith("hfr_")
    me = await door.ask(answer.access_token, "GetSelf", pb.GetSelfRequest())
    assert (me.kind, me.id, me.email, me.organisation_id) == ("account", ada.id, ada.email, ada.organisation_id)


async def test_a_session_remembers_where_it_began(door: SignIns) -> None:
    ada = await door.add_account()
    answer = await door.login(ada.email)
    session = next(row for row in await door.rows(sessions) if row.id == answer.session_id)
    assert (session.address, session.user_agent, session.method) == (ADDRESS, "browser of tests", "password")
    (account,) = await door.rows(accounts, id=ada.id)
    assert account.last_login_at == door.now
    (record,) = await door.audited(ada.organisation_id)
    assert (record.action, record.actor_id, record.target_id) == ("login", ada.id, answer.session_id)
    (token,) = await door.rows(refresh_tokens)
    assert answer.refresh_token.encode() not in token.hash


async def test_unknown_wrong_and_without_a_password_are_told_the_same(door: SignIns) -> None:
    ada = await door.add_account()
    await door.add_account("bob@example.com", password=False)
    answers = set()
    for email, password in (
        (ada.email, WRONG),
        ("nobody@example.com", PASSWORD),
        ("bob@example.com", PASSWORD),
        ("", ""),
    ):
        with pytest.raises(HelixError) as caught:
            await door.login(email, password)
        answers.add((caught.value.kind, caught.value.message, caught.value.param, caught.value.retry_after_s))
    assert len(answers) == 1 and answers.pop()[0] is ErrorKind.INVALID_CREDENTIALS


async def test_failures_are_recorded_without_what_was_typed(door: SignIns) -> None:
    ada = await door.add_account()
    for email in (ada.email, "my-secret-passphrase@example.com"):
        async with refused(ErrorKind.INVALID_CREDENTIALS):
            await door.login(email, WRONG)
    (known,) = await door.audited(ada.organisation_id)
    assert (known.outcome, known.reason, known.target_id) == ("denied", "invalid_credentials", ada.id)
    assert known.address == ADDRESS
    *_, unknown = await door.audited("")
    assert (unknown.action, unknown.outcome, unknown.target_id) == ("login", "denied", "m…@e…")
    assert "secret" not in f"{unknown}" and WRONG not in f"{known}{unknown}"


async def test_a_suspended_account_is_told_so_only_with_the_right_password(door: SignIns) -> None:
    ada = await door.add_account(suspended=True)
    async with refused(ErrorKind.INVALID_CREDENTIALS):
        await door.login(ada.email, WRONG)
    async with refused(ErrorKind.PERMISSION_DENIED):
        await door.login(ada.email)
    assert [row.reason for row in await door.audited(ada.organisation_id)] == [
        "invalid_credentials",
        "permission_denied",
    ]


async def test_a_member_of_nothing_gets_nowhere(door: SignIns) -> None:
    ada = await door.add_account(roles={})
    async with refused(ErrorKind.PERMISSION_DENIED):
        await door.login(ada.email)


async def test_only_an_operators_token_holds_permissions_of_the_installation(door: SignIns) -> None:
    eve = await door.add_account("eve@example.com", operator=True)
    ada = await door.add_account(organisation_id=eve.organisation_id)
    answers = {person.id: await door.login(person.email) for person in (eve, ada)}
    for _ in range(2):
        scopes = {name: set(door.claims(answer)["scope"].split()) for name, answer in answers.items()}
        assert scopes[eve.id] >= INSTALLATION_PERMISSIONS
        assert scopes[eve.id] - INSTALLATION_PERMISSIONS == scopes[ada.id]
        answers = {name: await door.refresh(answer.refresh_token) for name, answer in answers.items()}


async def test_the_organisation_and_project_that_are_asked_for(door: SignIns) -> None:
    ada = await door.add_account()
    other, strange = await door.add_organisation("Other"), await door.add_organisation("Strange")
    mine, theirs = await door.add_project(other, "Mine"), await door.add_project(strange, "Theirs")
    closed = await door.add_project(other, "Closed")
    await door.add_membership(ada.id, other, "developer", mine)
    answer = await door.login(ada.email, organisation_id=other)
    claims = door.tokens.read(answer.access_token)
    assert (claims.org, claims.project, claims.roles) == (other, mine, [])
    assert "models:use" in claims.scope.split()
    for organisation_id in (strange, "org_unknown"):
        async with refused(ErrorKind.NOT_FOUND, "organisation_id"):
            await door.login(ada.email, organisation_id=organisation_id)
    for project_id in (closed, theirs, "proj_unknown"):
        async with refused(ErrorKind.NOT_FOUND, "project_id"):
            await door.login(ada.email, organisation_id=other, project_id=project_id)


async def test_the_default_project_is_the_oldest_one_with_models(door: SignIns) -> None:
    ada = await door.add_account(roles={"": "viewer"})
    await door.add_project(ada.organisation_id, "First")
    door.clock.advance(1)
    second = await door.add_project(ada.organisation_id, "Second")
    assert door.tokens.read((await door.login(ada.email)).access_token).project == ""
    await door.add_membership(ada.id, ada.organisation_id, "developer", second)
    assert door.tokens.read((await door.login(ada.email)).access_token).project == second


async def test_a_deleted_organisation_is_none(door: SignIns) -> None:
    ada = await door.add_account()
    other = await door.add_organisation("Other")
    await door.add_membership(ada.id, other, "viewer")
    await door.delete_organisation(ada.organisation_id)
    assert door.tokens.read((await door.login(ada.email)).access_token).org == other


async def test_an_old_hash_is_replaced_at_the_next_sign_in(door: SignIns) -> None:
    ada = await door.add_account()
    weak = door.weak_hash(PASSWORD)
    await door.set(ada, password_hash=weak)
    await door.login(ada.email)
    (account,) = await door.rows(accounts, id=ada.id)
    assert account.password_hash.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert await door.login(ada.email)


async def test_what_is_too_long_is_refused_before_any_work(door: SignIns) -> None:
    async with refused(ErrorKind.UNPROCESSABLE, "email"):
        await door.login("a" * 300 + "@example.com")
    async with refused(ErrorKind.UNPROCESSABLE, "password"):
        await door.login("ada@example.com", "x" * 1025)
