"""Signing in over HTTP: refresh tokens, the second factor, and the keys that tokens are signed with."""

import asyncio
import base64
import time

from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.twofactor.totp import TOTP

from tests.harness.node import Node
from tests.harness.visitor import EFFECTIVE_S, PASSWORD, Visitor, header_of, until_refused, visit

EMAIL_DOMAIN = "sessions.example"


async def begin(operator: Visitor, name: str) -> Visitor:
    """A new developer who has signed in."""
    await operator.new_user(f"{name}@{EMAIL_DOMAIN}", "developer")
    return await operator.sign_in(f"{name}@{EMAIL_DOMAIN}")


async def test_a_refresh_token_works_once_and_twice_ends_the_session(node: Node) -> None:
    async with visit(node) as operator:
        first = await begin(operator, "refresh")
        second = await first.refresh()
        third = await second.refresh()
        for session in (first, second, third):
            assert (await session.models()).status_code == 200, "access tokens live on"
        other = await operator.sign_in(f"refresh@{EMAIL_DOMAIN}")
        reused = await operator.as_other("").admin("POST", "/auth/refresh", {"refresh_token": second.refresh_token})
        assert (reused.status_code, reused.json()["code"]) == (401, "invalid_token")
        for session in (first, second, third):
            await until_refused(session)
        after = await operator.as_other("").admin("POST", "/auth/refresh", {"refresh_token": third.refresh_token})
        assert after.status_code == 401
        assert (await other.models()).status_code == 200, "another session of the same account"
        (record,) = (await operator.admin("GET", "/audit/records?action=refresh_token_reused")).json()["data"]
        assert record["target_kind"] == "session"


async def test_of_many_refreshes_at_once_one_succeeds(node: Node) -> None:
    async with visit(node) as operator:
        session = await begin(operator, "race")
        body = {"refresh_token": session.refresh_token}
        answers = await asyncio.gather(*(operator.as_other("").admin("POST", "/auth/refresh", body) for _ in range(6)))
        assert sorted(answer.status_code for answer in answers) == [200] + [401] * 5
        await until_refused(session)


async def test_after_a_logout_nothing_of_the_session_works(node: Node) -> None:
    async with visit(node) as operator:
        session = await begin(operator, "logout")
        nobody = operator.as_other("")
        body = {"refresh_token": session.refresh_token}
        assert (await nobody.admin("POST", "/auth/logout", body)).status_code == 204
        await until_refused(session)
        assert (await session.admin("GET", "/me")).status_code == 401
        assert (await nobody.admin("POST", "/auth/refresh", body)).status_code == 401
        assert (await nobody.admin("POST", "/auth/logout", body)).status_code == 204, "twice is no error"


def code_of(secret: str, at: float) -> str:
    """What an authenticator app shows at that time."""
    raw = base64.b32decode(secret + "=" * (-len(secret) % 8))
    return TOTP(raw, 6, SHA1(), 30, enforce_key_length=False).generate(int(at)).decode()


async def test_the_second_factor_from_enrolment_to_its_end(node: Node) -> None:
    async with visit(node) as operator:
        session = await begin(operator, "mfa")
        nobody = operator.as_other("")
        credentials = {"email": f"mfa@{EMAIL_DOMAIN}", "password": PASSWORD}
        wrong = await session.admin("POST", "/auth/mfa/enrol", {"current_password": "wrong"})
        assert wrong.status_code == 401
        enrolment = await session.make("/auth/mfa/enrol", {"current_password": PASSWORD})
        assert enrolment["secret"] in enrolment["uri"]
        assert "challenge" not in await nobody.make("/auth/login", credentials), "not before it is confirmed"
        # The codes of now, and of the next half minute, which clocks may be ahead by: each works once.
        now = time.time()
        code, next_code = code_of(enrolment["secret"], now), code_of(enrolment["secret"], now + 30)
        recovery = (await session.make("/auth/mfa/confirm", {"code": code}))["codes"]
        assert (await session.admin("GET", "/me")).json()["mfa_enabled"] is True

        challenge = (await nobody.make("/auth/login", credentials))["challenge"]
        again = await nobody.admin("POST", "/auth/mfa/verify", {"challenge": challenge, "code": code})
        assert again.status_code == 401, "used"
        tokens = await nobody.make("/auth/mfa/verify", {"challenge": challenge, "code": next_code})
        signed_in = operator.as_other(tokens["access_token"])
        assert (await signed_in.chat()).status_code == 200
        spent = await nobody.admin("POST", "/auth/mfa/verify", {"challenge": challenge, "code": recovery[0]})
        assert spent.status_code == 401, "a challenge is good for one session"

        challenge = (await nobody.make("/auth/login", credentials))["challenge"]
        tokens = await nobody.make("/auth/mfa/verify", {"challenge": challenge, "code": recovery[1].upper()})
        (current,) = [
            entry
            for entry in (await operator.as_other(tokens["access_token"]).admin("GET", "/me/sessions")).json()["data"]
            if entry["current"]
        ]
        assert current["method"] == "password+recovery_code"
        body = {"current_password": PASSWORD, "code": recovery[1]}
        assert (await signed_in.admin("POST", "/auth/mfa/disable", body)).status_code == 401, "used"
        await signed_in.do("POST", "/auth/mfa/disable", {**body, "code": recovery[2]})
        assert "access_token" in await nobody.make("/auth/login", credentials)


async def test_old_tokens_outlive_the_rotation_of_their_key(node: Node) -> None:
    """test_serve_two_nodes.py sees the new key sign."""
    async with visit(node) as operator:
        session = await begin(operator, "rotation")
        old_kid = header_of(session.credential)["kid"]
        refused = await session.admin("POST", "/signing-keys/rotate")
        assert refused.status_code == 403, "for operators of the installation"
        rotated = await operator.make("/signing-keys/rotate", None)
        assert rotated["kid"] != old_kid

        async def kids() -> list[str]:
            return [key["kid"] for key in (await operator.ask("GET", "/.well-known/jwks.json")).json()["keys"]]

        deadline = time.monotonic() + EFFECTIVE_S
        while rotated["kid"] not in await kids():
            assert time.monotonic() < deadline, "announced at once"
        assert old_kid in await kids()
        for visitor in (session, await session.refresh()):
            # It is announced for some seconds before it signs.
            assert header_of(visitor.credential)["kid"] == old_kid
            assert (await visitor.chat()).status_code == 200
            assert (await visitor.admin("GET", "/me")).status_code == 200
