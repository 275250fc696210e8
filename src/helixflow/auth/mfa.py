"""What people do with their own second factor: begin, confirm, renew recovery codes, turn off."""

from collections.abc import Awaitable, Callable
from typing import Any, Final

from sqlalchemy import Row

from helixflow.auth.dispatch import Invocation
from helixflow.auth.lockout import Lockout
from helixflow.auth.one_time_tokens import Purpose, end_of_account
from helixflow.auth.proof import PasswordProof, find_own_account, recheck, record_failure
from helixflow.auth.second_factor import SecondFactor
from helixflow.auth.totp import enrolment_uri, secret_text
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import sessions_pb2 as pb

_Check = Callable[[Unit, Row[Any], str], Awaitable[object]]
_WRONG_CODE: Final = "The code is wrong or was used."


class Mfa:
    """A stolen access token alone changes nothing here: each act needs the password, or a code of the new secret.

    What ends the present second factor, or could, needs a code of it too.
    """

    def __init__(self, proof: PasswordProof, lockout: Lockout, second_factor: SecondFactor) -> None:
        self._proof = proof
        self._lockout = lockout
        self._second_factor = second_factor

    async def enrol(self, invocation: Invocation, request: pb.EnrolMfaRequest) -> pb.EnrolMfaResponse:
        proven = await self._proof.of_caller(invocation, request.current_password)
        async with invocation.writing() as unit:
            account = await recheck(unit, proven)
            if account.totp_confirmed_at is not None:
                raise HelixError(ErrorKind.CONFLICT, "The second factor is on already. Turn it off first.")
            secret = await self._second_factor.enrol(unit, account.id)
            unit.record("user", account.id)
        return pb.EnrolMfaResponse(secret=secret_text(secret), uri=enrolment_uri(secret, account.email))

    async def confirm(self, invocation: Invocation, request: pb.ConfirmMfaRequest) -> pb.RecoveryCodes:
        codes: list[str] = []
        async with invocation.writing() as unit:
            account = await find_own_account(unit)
            if account.totp_secret is None or account.totp_confirmed_at is not None:
                raise HelixError(ErrorKind.CONFLICT, "There is no second factor to confirm. Begin with a new one.")
            if await self._try(unit, invocation.action, account, self._second_factor.check_totp, request.code):
                await self._second_factor.confirm(unit, account.id)
                codes = await self._second_factor.renew_recovery_codes(unit, account.id)
                unit.record("user", account.id, before={"mfa_enabled": False}, after={"mfa_enabled": True})
        if not codes:
            raise HelixError(ErrorKind.INVALID_CREDENTIALS, _WRONG_CODE, param="code")
        return pb.RecoveryCodes(codes=codes)

    async def renew_recovery_codes(
        self, invocation: Invocation, request: pb.RenewRecoveryCodesRequest
    ) -> pb.RecoveryCodes:
        """As much as `disable` takes: with the new codes it could be turned off."""
        codes: list[str] = []
        proven = await self._proof.of_caller(invocation, request.current_password)
        async with invocation.writing() as unit:
            account = await recheck(unit, proven)
            _check_on(account)
            if await self._try(unit, invocation.action, account, self._second_factor.check, request.code):
                codes = await self._second_factor.renew_recovery_codes(unit, account.id)
                unit.record("user", account.id)
        if not codes:
            raise HelixError(ErrorKind.INVALID_CREDENTIALS, _WRONG_CODE, param="code")
        return pb.RecoveryCodes(codes=codes)

    async def disable(self, invocation: Invocation, request: pb.DisableMfaRequest) -> pb.DisableMfaResponse:
        proven = await self._proof.of_caller(invocation, request.current_password)
        async with invocation.writing() as unit:
            account = await recheck(unit, proven)
            _check_on(account)
            right = await self._try(unit, invocation.action, account, self._second_factor.check, request.code)
            if right:
                await self._second_factor.remove(unit, account.id)
                await end_of_account(unit, account.id, Purpose.MFA)
                unit.record("user", account.id, before={"mfa_enabled": True}, after={"mfa_enabled": False})
        if not right:
            raise HelixError(ErrorKind.INVALID_CREDENTIALS, _WRONG_CODE, param="code")
        return pb.DisableMfaResponse()

    async def _try(self, unit: Unit, action: str, account: Row[Any], check: _Check, code: str) -> bool:
        """Whether the code is right, counted and recorded if not. Raises `HelixError` TOO_MANY_ATTEMPTS."""
        attempt = self._lockout.attempt(account.email, unit.caller.source.address)
        await self._lockout.check(unit.connection, attempt, unit.now)
        if await check(unit, account, code):
            return True
        record_failure(unit, action, account, await self._lockout.fail(unit, attempt))
        return False


def _check_on(account: Row[Any]) -> None:
    if account.totp_confirmed_at is None:
        raise HelixError(ErrorKind.CONFLICT, "The second factor is not on.")
