"""Another master key for a database: with the old one nobody notices, without it nothing is left that is sealed."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import select, update

import helixflow.auth
from helixflow.auth.audit.checkpoints import EVERY_S, Checkpoints
from helixflow.auth.failure_tally import BY_EMAIL
from helixflow.auth.master_key import MasterKey, check_master_key
from helixflow.auth.master_key_replacement import SEALED, replace_master_key
from helixflow.auth.second_factor import SEALED as SECOND_FACTORS
from helixflow.auth.signing_key_rotation import FIRST_ANNOUNCED_S
from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.rpc.generated.auth_v1 import admin_pb2, identity_pb2
from helixflow.rpc.generated.auth_v1 import sessions_pb2 as pb
from helixflow.storage.engine import Database
from helixflow.storage.schema import (
    accounts,
    audit_checkpoints,
    idempotency_keys,
    installation,
    recovery_codes,
    sessions,
    sign_in_failures,
    signing_keys,
)
from tests.harness.auth import Person, refused
from tests.harness.sessions import PASSWORD, WRONG, SignIns

OLD, NEW = MasterKey(bytes(32), "old.key"), MasterKey(bytes([7]) * 32, "new.key")
ANSWERS = 3
VERSIONS = {"serving_configurations": 1}


class House:
    """A database with something of every kind that is sealed."""

    def __init__(self, door: SignIns) -> None:
        self.door = door

    async def furnish(self) -> "House":
        door = self.door
        await check_master_key(door.database, OLD)
        self.ada, self.bob = await door.add_account("ada@example.com"), await door.add_account("bob@example.com")
        self.answer = await door.login(self.ada.email)
        self.secret, self.codes = await door.turn_on_mfa(self.answer.access_token)
        # Begun, and not confirmed.
        bobs = await door.login(self.bob.email)
        await door.ask(bobs.access_token, "EnrolMfa", pb.EnrolMfaRequest(current_password=PASSWORD))
        self.projects = [await self.make_project(door, number) for number in range(ANSWERS)]
        await door.serving.begin(door.found)
        self.kid = door.kid(self.answer)
        await Checkpoints(door.database, door.sealer).sign_due(door.now)
        return self

    async def make_project(self, door: SignIns, number: int) -> str:
        request = admin_pb2.CreateProjectRequest(name=f"Project {number}")
        made = await door.call(self.ada, "CreateProject", request, idempotency_key=f"answer-{number}")
        return str(made.id)

    def reopen(self) -> SignIns:
        """The service after its next start, with the new key."""
        return SignIns(self.door.database, self.door.clock, key="second", master_key=NEW.key)

    async def audit_keys(self) -> list[str]:
        """Who signed the checkpoints, oldest first."""
        query = select(audit_checkpoints.c.kid).order_by(audit_checkpoints.c.at)
        return list(dict.fromkeys(row.kid for row in await self.door.database.fetch_all(query)))


@pytest.fixture
async def house(door: SignIns) -> House:
    return await House(door).furnish()


@pytest.fixture
async def reopened(house: House) -> AsyncIterator[SignIns]:
    door = house.reopen()
    yield door
    await door.close()


async def verify(door: SignIns, person: Person, code: str) -> pb.LoginResponse:
    challenge = (await door.login(person.email)).challenge
    answer: pb.LoginResponse = await door.ask(None, "VerifyMfa", pb.VerifyMfaRequest(challenge=challenge, code=code))
    return answer


async def test_with_the_old_key_nobody_notices(
    house: House, reopened: SignIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helixflow.auth.master_key_replacement._PAGE", 2)
    key_set = await house.door.keys.public_keys()
    told = await house.door.told()
    counts = await replace_master_key(house.door.units, OLD, NEW)
    assert counts == {"token_keys": 1, "audit_keys": 1, "second_factors": 2, "remembered_answers": ANSWERS} | VERSIONS
    await check_master_key(house.door.database, NEW)
    with pytest.raises(UserError, match=r"old\.key: not the master key .* replaced on 2\d{3}-.*replace-master-key"):
        await check_master_key(house.door.database, OLD)
    # The set of keys, the key that signs, tokens and sessions from before.
    assert await reopened.keys.public_keys() == key_set
    await reopened.keys.refresh()
    assert (await reopened.ask(house.answer.access_token, "GetSelf", pb.GetSelfRequest())).id == house.ada.id
    assert reopened.kid(await reopened.refresh(house.answer.refresh_token)) == house.kid
    # Second factors.
    answer = await verify(reopened, house.ada, reopened.code(house.secret))
    assert reopened.kid(answer) == house.kid
    assert await verify(reopened, house.ada, house.codes[0])
    # Answers to requests that come again.
    assert [await house.make_project(reopened, number) for number in range(ANSWERS)] == house.projects
    # What is served.
    await reopened.serving.begin(reopened.found)
    assert reopened.serving.feed.current.revision == 1
    # Checkpoints.
    reopened.clock.advance(EVERY_S)
    assert await Checkpoints(reopened.database, reopened.sealer).sign_due(reopened.now)
    assert len(await house.audit_keys()) == 1
    assert await house.door.told() == told
    (record,) = await house.door.audited("", action="replace_master_key")
    assert (record.actor_kind, record.target_kind) == ("system", "master_key")
    assert json.loads(record.after) == {**counts, "lost": False}


async def test_nothing_opens_with_the_old_key_any_more(house: House) -> None:
    await replace_master_key(house.door.units, OLD, NEW)
    for at in SEALED.values():
        for row in await house.door.rows(at.column.table):
            sealed = getattr(row, at.column.name)
            if sealed is not None:
                context = "\0".join(str(getattr(row, part.name)) for part in at.column.table.primary_key)
                with pytest.raises(HelixError):
                    house.door.sealer.open(at.purpose, sealed, context)


async def test_a_lost_key_takes_all_that_it_sealed(house: House, reopened: SignIns) -> None:
    (audit_key,) = await house.audit_keys()
    open_sessions = [row.id for row in await house.door.rows(sessions, ended_at=None)]
    counts = await replace_master_key(house.door.units, None, NEW)
    assert counts == {
        "token_keys": 1,
        "audit_keys": 1,
        "second_factors": 2,
        "remembered_answers": ANSWERS,
        "sessions": len(open_sessions),
        **VERSIONS,
    }
    await check_master_key(house.door.database, NEW)
    # Gateways learn of the sessions and of the keys.
    told = await house.door.told()
    assert {(identity_pb2.CHANGE_KIND_SESSION, id_, "") for id_ in open_sessions} <= set(told)
    assert (identity_pb2.CHANGE_KIND_SIGNING_KEYS, house.kid, "") in told
    assert await reopened.rows(sessions, ended_at=None) == []
    async with refused(ErrorKind.INVALID_TOKEN):
        await reopened.refresh(house.answer.refresh_token)
    # The next start makes a key; the password alone lets in, and a new second factor can be had.
    assert await reopened.keys.public_keys() == []
    await reopened.rotation.ensure_first()
    reopened.clock.advance(FIRST_ANNOUNCED_S)
    await reopened.keys.refresh()
    async with refused(ErrorKind.INVALID_TOKEN):
        await reopened.ask(house.answer.access_token, "GetSelf", pb.GetSelfRequest())
    answer = await reopened.login(house.ada.email)
    assert not answer.challenge and reopened.kid(answer) != house.kid
    assert await reopened.rows(recovery_codes) == []
    secret, _ = await reopened.turn_on_mfa(answer.access_token)
    assert await verify(reopened, house.ada, reopened.code(secret))
    (record,) = [
        row
        for row in await reopened.audited(house.ada.organisation_id, action="replace_master_key")
        if row.target_id == house.ada.id
    ]
    assert (record.before, record.after) == ('{"mfa_enabled":true}', '{"mfa_enabled":false}')
    assert await reopened.audited(house.bob.organisation_id, action="replace_master_key") == []
    # The audit log goes on under a new key, and the old one stays known.
    reopened.clock.advance(EVERY_S)
    assert await Checkpoints(reopened.database, reopened.sealer).sign_due(reopened.now)
    keys = await house.audit_keys()
    assert keys[0] == audit_key and len(keys) == 2
    assert {row.kid for row in await reopened.rows(signing_keys, purpose="audit")} == set(keys)
    (record,) = await reopened.audited("", action="replace_master_key")
    assert '"lost":true' in record.after
    assert await reopened.rows(idempotency_keys) == []


async def test_a_challenge_from_before_the_loss_is_void(house: House, reopened: SignIns) -> None:
    challenge = (await house.door.login(house.ada.email)).challenge
    await replace_master_key(house.door.units, None, NEW)
    async with refused(ErrorKind.INVALID_TOKEN):
        await reopened.ask(None, "VerifyMfa", pb.VerifyMfaRequest(challenge=challenge, code=house.codes[0]))


async def test_failed_sign_ins_count_anew(house: House, reopened: SignIns) -> None:
    for _ in range(BY_EMAIL.failures):
        async with refused(ErrorKind.INVALID_CREDENTIALS):
            await house.door.login(house.bob.email, WRONG)
    await replace_master_key(house.door.units, OLD, NEW)
    assert await reopened.rows(sign_in_failures) == []
    assert await reopened.login(house.bob.email)


async def test_something_damaged_is_named_and_nothing_changes(house: House) -> None:
    async with house.door.database.writing() as connection:
        damaged = (
            update(accounts).where(accounts.c.id == house.bob.id).values(totp_secret=b"\1 damaged for a long time")
        )
        await connection.execute(damaged)
    before = await everything(house.door.database)
    with pytest.raises(UserError, match=rf"accounts\.totp_secret.*{house.bob.id}.*nothing has changed") as caught:
        await replace_master_key(house.door.units, OLD, NEW)
    assert caught.value.exit_code is ExitCode.STORAGE
    assert await everything(house.door.database) == before


async def test_the_wrong_old_key_changes_nothing(house: House) -> None:
    before = await everything(house.door.database)
    with pytest.raises(UserError, match="not the master key"):
        await replace_master_key(house.door.units, NEW, MasterKey(bytes([9]) * 32, "third.key"))
    assert await everything(house.door.database) == before


async def everything(database: Database) -> list[object]:
    tables = (installation, accounts, signing_keys, idempotency_keys, sign_in_failures)
    return [list(await database.fetch_all(select(table).order_by(*table.primary_key))) for table in tables]


def test_whatever_is_sealed_is_known_to_the_replacement() -> None:
    """A new use of `Sealer.seal` without its place in `SEALED` would be unreadable after a replacement."""
    folder = Path(next(iter(helixflow.auth.__path__)))
    uses = sum(len(re.findall(r"ealer\.seal\(|new\.seal\(", path.read_text())) for path in folder.rglob("*.py"))
    # One for each kind, and that of the replacement itself.
    assert uses == len(SEALED) + 1
    assert SEALED["second_factors"] is SECOND_FACTORS
