"""Another master key for a database that nobody else uses meanwhile: all that is sealed, sealed anew or given up."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Column, bindparam, delete, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth import idempotency, second_factor, signing_keys
from helixflow.auth.audit import checkpoints
from helixflow.auth.audit.entry import INSTALLATION
from helixflow.auth.caller import Caller, CallerKind
from helixflow.auth.configuration import history
from helixflow.auth.master_key import MasterKey, find_check, replace_check
from helixflow.auth.one_time_tokens import Purpose, end_all
from helixflow.auth.sealing import SealedColumn, Sealer
from helixflow.auth.sessions import EndReason, end_all_sessions
from helixflow.auth.unit import Unit, Units
from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.rpc.access import Access, Level
from helixflow.rpc.generated.auth_v1 import identity_pb2
from helixflow.storage.schema import idempotency_keys, serving_configurations, sign_in_attempts, sign_in_failures
from helixflow.storage.schema import signing_keys as signing_key_rows

# All that is ever sealed, by the names under which it is counted.
SEALED: Final[Mapping[str, SealedColumn]] = {
    "token_keys": signing_keys.SEALED,
    "audit_keys": checkpoints.SEALED,
    "second_factors": second_factor.SEALED,
    "remembered_answers": idempotency.SEALED,
    "serving_configurations": history.SEALED,
}
_PAGE: Final = 500
_ACTION: Final = "replace_master_key"
_SYSTEM: Final = Caller(CallerKind.SYSTEM, name="master key")
_ACCESS: Final = Access(Level.SERVICE, None, writes=True, idempotent=False)


async def replace_master_key(units: Units, old: MasterKey | None, new: MasterKey) -> Mapping[str, int]:
    """Makes `new` the key of the database, in one transaction, and says so in the installation's audit log.

    With `old` everything is sealed anew and nobody notices. With None, for a key that is lost, what cannot be opened is
    given up: signing keys (new ones are made at the next start; public halves for the audit log stay), second factors
    with their recovery codes, remembered answers, the history of the serving configuration; all sessions end. Either
    way the counts of failed sign-ins begin anew: they are kept under hashes that only the old key makes. No service may
    run on the database.

    Returns how many of each kind. Raises `UserError`: CONFIG when `old` is not the key, STORAGE when something cannot
    be opened; `HelixError` when the database cannot be used. Nothing has changed then, unless that failed at its end.
    """
    sealer = Sealer(new.key)
    async with units.writing(_SYSTEM, _ACCESS, _ACTION) as unit:
        if old is None:
            counts = await _give_up(unit)
            sealed = dict.fromkeys(SEALED, 0)
        else:
            counts = sealed = await _rotate(unit, old, sealer)
        for counts_of_failures in (sign_in_failures, sign_in_attempts):
            await unit.connection.execute(delete(counts_of_failures))
        await replace_check(unit.connection, new, unit.now)
        await _verify(unit.connection, sealer, sealed)
        unit.record("master_key", "", after={**counts, "lost": old is None}, organisation_id=INSTALLATION)
    return counts


async def _rotate(unit: Unit, old: MasterKey, new: Sealer) -> dict[str, int]:
    """How many of each."""
    check = await find_check(unit.connection)
    # Somebody may have been quicker.
    if check is None or not old.opens(check.data):
        raise UserError(f"{old.origin}: not the master key of this database", ExitCode.CONFIG)
    sealer = Sealer(old.key)
    return {name: await _seal_anew(unit.connection, at, sealer, new) for name, at in SEALED.items()}


async def _seal_anew(connection: AsyncConnection, at: SealedColumn, old: Sealer, new: Sealer) -> int:
    """How many values."""
    table, key = at.column.table, _key(at)
    change = update(table).where(*(part == bindparam(f"_{part.name}") for part in key))
    change = change.values({at.column: bindparam("_sealed")})
    count = 0
    async for rows in _pages(connection, at):
        changes = []
        for identity, sealed in rows:
            value = new.seal(at.purpose, _open(at, identity, sealed, old), _context(identity))
            changes.append(
                {f"_{part.name}": held for part, held in zip(key, identity, strict=True)} | {"_sealed": value}
            )
        await connection.execute(change, changes)
        count += len(changes)
    return count


async def _give_up(unit: Unit) -> dict[str, int]:
    """How many of each."""
    ended = await end_all_sessions(unit, EndReason.REVOKED)
    keys = signing_key_rows
    # Without any the next start makes one.
    gone = await unit.connection.execute(
        delete(keys).where(keys.c.purpose == signing_keys.PURPOSE).returning(keys.c.kid)
    )
    kids = sorted(gone.scalars())
    for kid in kids:
        await unit.change(identity_pb2.CHANGE_KIND_SIGNING_KEYS, kid)
    audit_keys = await unit.connection.execute(
        update(keys).where(checkpoints.SEALED.only, keys.c.private_key.is_not(None)).values(private_key=None)
    )
    await end_all(unit, Purpose.MFA)
    accounts = await second_factor.remove_all(unit)
    for account in accounts:
        if account.totp_confirmed_at is not None:
            unit.record(
                "user",
                account.id,
                before={"mfa_enabled": True},
                after={"mfa_enabled": False},
                organisation_id=account.home_organisation_id,
            )
    answers = await unit.connection.execute(delete(idempotency_keys))
    # The one in force is on the nodes, which begin the history anew.
    versions = await unit.connection.execute(delete(serving_configurations))
    return {
        "token_keys": len(kids),
        "audit_keys": audit_keys.rowcount,
        "second_factors": len(accounts),
        "remembered_answers": answers.rowcount,
        "serving_configurations": versions.rowcount,
        "sessions": ended,
    }


async def _verify(connection: AsyncConnection, sealer: Sealer, expected: Mapping[str, int]) -> None:
    """That all which is sealed can be opened, and that it is as much as was expected."""
    for name, at in SEALED.items():
        count = 0
        async for rows in _pages(connection, at):
            for identity, sealed in rows:
                _open(at, identity, sealed, sealer)
            count += len(rows)
        if count != expected[name]:
            raise HelixError(ErrorKind.INTERNAL, f"{name}: {count} values are sealed, not {expected[name]}.")


async def _pages(connection: AsyncConnection, at: SealedColumn) -> AsyncIterator[list[tuple[Sequence[Any], Any]]]:
    """The key and the sealed value of each row that has one."""
    key = _key(at)
    query = select(*key, at.column).where(at.only, at.column.is_not(None)).order_by(*key).limit(_PAGE)
    page = query
    while rows := (await connection.execute(page)).all():
        yield [(tuple(row[:-1]), row[-1]) for row in rows]
        page = query.where(tuple_(*key) > tuple(rows[-1][:-1]))


def _key(at: SealedColumn) -> Sequence[Column[Any]]:
    return list(at.column.table.primary_key)


def _open(at: SealedColumn, identity: Sequence[Any], sealed: bytes, sealer: Sealer) -> bytes:
    try:
        return sealer.open(at.purpose, sealed, _context(identity))
    except HelixError as exc:
        raise UserError(
            f"{at.column}: what is sealed for {identity[0]} is damaged, the key does not open it; nothing has changed: "
            "restore the database from a backup",
            ExitCode.STORAGE,
        ) from exc


def _context(identity: Sequence[Any]) -> str:
    return "\0".join(map(str, identity))
