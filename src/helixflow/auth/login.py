"""Login, with a password and perhaps a second factor."""

from typing import Any, Final

from sqlalchemy import Row, update

from helixflow.auth.dispatch import Invocation
from helixflow.auth.failure_tally import HALVING_S
from helixflow.auth.grants import Reader
from helixflow.auth.lockout import Attempt, Lockout
from helixflow.auth.one_time_tokens import Purpose, find, issue, use
from helixflow.auth.passwords import Passwords
from helixflow.auth.places import Place
from helixflow.auth.proof import PasswordProof, find_account, recheck, record_denial, record_failure
from helixflow.auth.second_factor import SecondFactor
from helixflow.auth.sign_in import Admission, SignIn, place_of
from helixflow.auth.signing_keys import SigningKeys
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import sessions_pb2 as pb
from helixflow.storage.schema import accounts, one_time_tokens

CHALLENGE_LIFE_S: Final = 5 * 60
CHALLENGE_ATTEMPTS: Final = 5
_PASSWORD: Final = "password"  # noqa: S105 — the name of the method


class Login:
    """Login and VerifyMfa. What is refused is committed with its record first, and raised then."""

    def __init__(
        self,
        passwords: Passwords,
        proof: PasswordProof,
        lockout: Lockout,
        second_factor: SecondFactor,
        keys: SigningKeys,
        sign_in: SignIn,
    ) -> None:
        self._passwords = passwords
        self._proof = proof
        self._lockout = lockout
        self._second_factor = second_factor
        self._keys = keys
        self._sign_in = sign_in

    async def login(self, invocation: Invocation, request: pb.LoginRequest) -> pb.LoginResponse:
        await self._keys.ready()
        account = await self._proof.by_email(invocation, request.email, request.password)
        new_hash = await self._improved_hash(account, request.password)
        async with invocation.writing() as unit:
            outcome = await self._enter(unit, invocation.action, request, await recheck(unit, account), new_hash)
        return await self._answer(outcome)

    async def verify_mfa(self, invocation: Invocation, request: pb.VerifyMfaRequest) -> pb.LoginResponse:
        # Anybody may try: who brings no challenge, or is locked out, takes nobody's turn to write.
        address = invocation.caller.source.address
        await self._find_challenge(invocation.lookups, request.challenge, address, invocation.now)
        async with invocation.writing() as unit:
            outcome = await self._meet_challenge(unit, invocation.action, request)
        return await self._answer(outcome)

    async def _enter(
        self, unit: Unit, action: str, request: pb.LoginRequest, account: Row[Any], new_hash: str | None
    ) -> Admission | str | HelixError:
        """The password was right."""
        place = await _place(unit, action, account, request.organisation_id, request.project_id)
        if isinstance(place, HelixError):
            return place
        if new_hash is not None:
            changed = update(accounts).where(accounts.c.id == account.id).values(password_hash=new_hash)
            await unit.connection.execute(changed)
        if account.totp_confirmed_at is not None:
            # The project as it was asked for: '' is looked up again.
            _, challenge = await issue(
                unit,
                Purpose.MFA,
                organisation_id=place.organisation_id,
                project_id=request.project_id,
                account_id=account.id,
                method=_PASSWORD,
                life_s=CHALLENGE_LIFE_S,
            )
            return challenge
        return await self._open(unit, account, place, _PASSWORD)

    async def _meet_challenge(self, unit: Unit, action: str, request: pb.VerifyMfaRequest) -> Admission | HelixError:
        address = unit.caller.source.address
        challenge, account, attempt = await self._find_challenge(unit.connection, request.challenge, address, unit.now)
        factor = await self._second_factor.check(unit, account, request.code)
        if factor is None:
            await self._count_failure(unit, challenge)
            record_failure(unit, action, account, await self._lockout.fail(unit, attempt))
            return HelixError(ErrorKind.INVALID_CREDENTIALS, "The code is wrong or was used.")
        await use(unit, challenge.id)
        place = await _place(unit, action, account, challenge.organisation_id, challenge.project_id)
        if isinstance(place, HelixError):
            return place
        return await self._open(unit, account, place, f"{challenge.method}+{factor}")

    async def _find_challenge(
        self, reader: Reader, text: str, address: str, now: int
    ) -> tuple[Row[Any], Row[Any], Attempt]:
        """Its row, the account's, and the attempt to meet it. Raises `HelixError` INVALID_TOKEN, TOO_MANY_ATTEMPTS."""
        challenge = await find(reader, text, (Purpose.MFA,), now)
        account = await find_account(reader, challenge.account_id) if challenge is not None else None
        if challenge is None or account is None:
            raise _spent()
        attempt = self._lockout.attempt(account.email, address)
        await self._lockout.check(reader, attempt, now)
        return challenge, account, attempt

    async def _open(self, unit: Unit, account: Row[Any], place: Place, method: str) -> Admission:
        await self._lockout.forgive(unit, account.email)
        if (account.last_login_at or 0) <= unit.now - HALVING_S:
            # Not each time: whoever guesses must not buy as many guesses with an account of their own.
            await self._lockout.credit_address(unit)
        return await self._sign_in.open(unit, account, place, method)

    async def _count_failure(self, unit: Unit, challenge: Row[Any]) -> None:
        attempts = challenge.attempts + 1
        spent = unit.now if attempts >= CHALLENGE_ATTEMPTS else None
        await unit.connection.execute(
            update(one_time_tokens).where(one_time_tokens.c.id == challenge.id).values(attempts=attempts, used_at=spent)
        )

    async def _improved_hash(self, account: Row[Any], password: str) -> str | None:
        if not self._passwords.is_outdated(account.password_hash):
            return None
        try:
            return await self._passwords.rehash(password)
        except HelixError:
            # Too many wait: the next sign-in will do it.
            return None

    async def _answer(self, outcome: Admission | str | HelixError) -> pb.LoginResponse:
        match outcome:
            case HelixError():
                raise outcome
            case str():
                return pb.LoginResponse(challenge=outcome)
        return await self._sign_in.answer(outcome)


def _spent() -> HelixError:
    return HelixError(ErrorKind.INVALID_TOKEN, "The challenge has expired or was used. Sign in again.")


async def _place(
    unit: Unit, action: str, account: Row[Any], organisation_id: str, project_id: str
) -> Place | HelixError:
    try:
        return await place_of(unit, account, organisation_id, project_id)
    except HelixError as exc:
        record_denial(unit, action, account.home_organisation_id, account.id, exc.kind)
        return exc
