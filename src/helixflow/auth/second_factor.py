"""The second factor of an account, as the database has it: an authenticator's secret, and recovery codes."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Row, delete, insert, select, update

from helixflow.auth.sealing import SealedColumn, Sealer
from helixflow.auth.totp import matching_step, new_recovery_codes, new_secret, recovery_hash
from helixflow.auth.unit import Unit
from helixflow.storage.schema import accounts, recovery_codes

TOTP: Final = "totp"
RECOVERY_CODE: Final = "recovery_code"
_SEAL: Final = "totp"
_OFF: Final[Mapping[str, Any]] = {"totp_secret": None, "totp_confirmed_at": None, "totp_used": 0}
SEALED: Final = SealedColumn(accounts.c.totp_secret, _SEAL)


class SecondFactor:
    """Within writing units: of two that bring the same code, one has used it up before the other looks."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    async def enrol(self, unit: Unit, account_id: str) -> bytes:
        """A new secret, which counts once a code of it has confirmed it."""
        secret = new_secret()
        sealed = self._sealer.seal(_SEAL, secret, account_id)
        values = {"totp_secret": sealed, "totp_confirmed_at": None, "totp_used": 0}
        await unit.connection.execute(update(accounts).where(accounts.c.id == account_id).values(values))
        return secret

    async def check_totp(self, unit: Unit, account: Row[Any], code: str) -> bool:
        """Whether it is a code of the authenticator; it then works no more."""
        if account.totp_secret is None:
            return False
        secret = self._sealer.open(_SEAL, account.totp_secret, account.id)
        step = matching_step(secret, code, unit.now, account.totp_used)
        if step is None:
            return False
        await unit.connection.execute(update(accounts).where(accounts.c.id == account.id).values(totp_used=step))
        return True

    async def check(self, unit: Unit, account: Row[Any], code: str) -> str | None:
        """`totp` or `recovery_code` when it is a code of either kind, which then works no more; otherwise None."""
        if await self.check_totp(unit, account, code):
            return TOTP
        used = await unit.connection.execute(
            update(recovery_codes)
            .where(
                recovery_codes.c.account_id == account.id,
                recovery_codes.c.hash == recovery_hash(code),
                recovery_codes.c.used_at.is_(None),
            )
            .values(used_at=unit.now)
        )
        return RECOVERY_CODE if used.rowcount == 1 else None

    async def confirm(self, unit: Unit, account_id: str) -> None:
        """From now on it is asked for."""
        await self._set(unit, account_id, {"totp_confirmed_at": unit.now})

    async def renew_recovery_codes(self, unit: Unit, account_id: str) -> list[str]:
        """New ones, which are not kept; the old ones end."""
        codes = new_recovery_codes()
        await self._forget_recovery_codes(unit, account_id)
        rows = [{"account_id": account_id, "hash": recovery_hash(code), "used_at": None} for code in codes]
        await unit.connection.execute(insert(recovery_codes), rows)
        return codes

    async def remove(self, unit: Unit, account_id: str) -> None:
        """The password alone is enough from now on."""
        await self._forget_recovery_codes(unit, account_id)
        await self._set(unit, account_id, _OFF)

    async def _set(self, unit: Unit, account_id: str, values: Mapping[str, Any]) -> None:
        changed = update(accounts).where(accounts.c.id == account_id)
        await unit.connection.execute(changed.values({**values, **_stamps(unit)}))

    async def _forget_recovery_codes(self, unit: Unit, account_id: str) -> None:
        await unit.connection.execute(delete(recovery_codes).where(recovery_codes.c.account_id == account_id))


async def remove_all(unit: Unit) -> Sequence[Row[Any]]:
    """From every account, for secrets that nobody can open. Returns those accounts, as they were: a second factor that
    was begun and not confirmed goes, too.
    """
    having = accounts.c.totp_secret.is_not(None)
    found = (await unit.connection.execute(select(accounts).where(having).order_by(accounts.c.id))).all()
    await unit.connection.execute(delete(recovery_codes))
    await unit.connection.execute(update(accounts).where(having).values({**_OFF, **_stamps(unit)}))
    return found


def _stamps(unit: Unit) -> Mapping[str, Any]:
    """What others see of an account changes with its second factor."""
    return {"updated_at": unit.now, "version": accounts.c.version + 1}
