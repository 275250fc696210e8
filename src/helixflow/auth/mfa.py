"""What people do with their own second factor: begin, confirm, renew recovery codes, turn off."""

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

_WRONG_CODE: Final = "The code is wrong or was used."


class Mfa:
    """A stolen access token alone changes nothing here: each act needs the password, or a code of the new secret."""

    def __init__(self, proof: PasswordProof, lockout: Lockout, second_factor: SecondFactor) -> None:
        self._proof = proof
        self._lockout = lockout
        self._second_factor = second_factor

    async def enrol(self, invocation: Invocation, request: pb.EnrolMfaRequest) -> pb.EnrolMfaResponse:
        proof = await self._proof.of_caller(invocation, request.current_password)
        async with invocation.writing() as unit:
            account = await recheck(unit, proof.account)
            await self._lockout.take_back(unit, proof.attempt)
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
            attempt = await self._lockout.count(unit, account.email)
            if await self._second_factor.check_totp(unit, account, request.code):
                await self._lockout.take_back(unit, attempt)
                await self._second_factor.confirm(unit, account.id)
                codes = await self._second_factor.renew_recovery_codes(unit, account.id)
                unit.record("user", account.id, before={"mfa_enabled": False}, after={"mfa_enabled": True})
            else:
                record_failure(unit, invocation.action, account, attempt)
        if not codes:
            raise HelixError(ErrorKind.INVALID_CREDENTIALS, _WRONG_CODE, param="code")
        return pb.RecoveryCodes(codes=codes)

    async def renew_recovery_codes(
        self, invocation: Invocation, request: pb.RenewRecoveryCodesRequest
    ) -> pb.RecoveryCodes:
        proof = await self._proof.of_caller(invocation, request.current_password)
        async with invocation.writing() as unit:
            account = await recheck(unit, proof.account)
            await self._lockout.take_back(unit, proof.attempt)
            _check_on(account)
            codes = await self._second_factor.renew_recovery_codes(unit, account.id)
            unit.record("user", account.id)
        return pb.RecoveryCodes(codes=codes)

    async def disable(self, invocation: Invocation, request: pb.DisableMfaRequest) -> pb.DisableMfaResponse:
        proof = await self._proof.of_caller(invocation, request.current_password)
        async with invocation.writing() as unit:
            done = await self._remove(unit, await recheck(unit, proof.account), request.code)
            if done:
                await self._lockout.take_back(unit, proof.attempt)
            else:
                record_failure(unit, invocation.action, proof.account, proof.attempt)
        if not done:
            raise HelixError(ErrorKind.INVALID_CREDENTIALS, _WRONG_CODE, param="code")
        return pb.DisableMfaResponse()

    async def _remove(self, unit: Unit, account: Row[Any], code: str) -> bool:
        _check_on(account)
        if await self._second_factor.check(unit, account, code) is None:
            return False
        await self._second_factor.remove(unit, account.id)
        await end_of_account(unit, account.id, Purpose.MFA)
        unit.record("user", account.id, before={"mfa_enabled": True}, after={"mfa_enabled": False})
        return True


def _check_on(account: Row[Any]) -> None:
    if account.totp_confirmed_at is None:
        raise HelixError(ErrorKind.CONFLICT, "The second factor is not on.")
