"""Signing keys: one at the first start, the next one announced first, the old one accepted as long as its tokens."""

import asyncio
import json

import pytest

from helixflow.auth.housekeeping import SessionHousekeeping
from helixflow.auth.master_key import MasterKey, check_master_key
from helixflow.auth.signing_key_rotation import ANNOUNCED_S, FIRST_ANNOUNCED_S
from helixflow.auth.tokens import ACCESS_LIFE_S, AccessTokens
from helixflow.core.claims import LEEWAY_S
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.rpc.generated.auth_v1 import admin_pb2, identity_pb2
from helixflow.rpc.generated.auth_v1 import sessions_pb2 as pb
from helixflow.storage.engine import Database
from helixflow.storage.schema import one_time_tokens, refresh_tokens, sessions, sign_in_failures, signing_keys
from tests.harness.auth import refused
from tests.harness.sessions import AUDIENCE, PASSWORD, WRONG, SignIns
from tests.harness.tokens import signing_key


async def rotate(door: SignIns, key: str, *, revoke_others: bool = False) -> admin_pb2.RotateSigningKeyResponse:
    door.next_key = key
    request = admin_pb2.RotateSigningKeyRequest(revoke_others=revoke_others)
    prepared = await door.rotation.prepare(request)
    async with door.system() as unit:
        unit.prepared = prepared
        return await door.rotation.rotate(unit, request)


async def kids(door: SignIns) -> list[str]:
    return [key.kid for key in await door.keys.public_keys()]


async def test_two_processes_that_start_at_once_end_with_one_key(database: Database) -> None:
    doors = [SignIns(database, key="first"), SignIns(database, key="second")]
    await asyncio.gather(*(door.rotation.ensure_first() for door in doors))
    (row,) = await doors[0].rows(signing_keys)
    await doors[1].rotation.ensure_first()
    assert await kids(doors[1]) == [row.kid]
    assert await doors[0].told() == [(identity_pb2.CHANGE_KIND_SIGNING_KEYS, row.kid, "")]
    (public,) = await doors[0].keys.public_keys()
    moduli = {signing_key(name, 4096).public_key().public_numbers().n for name in ("first", "second")}
    assert int.from_bytes(public.modulus) in moduli and len(public.modulus) == 512 and public.exponent == b"\1\0\1"
    for door in doors:
        await door.close()


async def test_a_sign_in_waits_for_the_first_key(database: Database) -> None:
    door = SignIns(database)
    ada = await door.add_account()
    waiting = asyncio.create_task(door.login(ada.email))
    await door.rotation.ensure_first()
    door.clock.advance(FIRST_ANNOUNCED_S)
    assert (await waiting).access_token
    await door.close()


async def test_a_new_key_signs_after_it_was_announced_and_the_old_one_lasts_as_long_as_its_tokens(
    door: SignIns,
) -> None:
    ada = await door.add_account()
    (old,) = await kids(door)
    answer = await rotate(door, "second")
    assert await kids(door) == [old, answer.kid]
    door.clock.advance(ANNOUNCED_S - 1)
    last = await door.login(ada.email)
    assert door.kid(last) == old
    door.clock.advance(1)
    first = await door.login(ada.email)
    assert door.kid(first) == answer.kid
    await door.keys.refresh()
    assert door.tokens.read(last.access_token) and door.tokens.read(first.access_token)
    door.clock.advance(ACCESS_LIFE_S - 2)
    await door.keys.refresh()
    assert door.tokens.read(last.access_token)
    door.clock.advance(answer.others_expire_at - door.now)
    assert await kids(door) == [answer.kid]
    assert answer.others_expire_at >= last_end(door, last) + LEEWAY_S
    (record,) = await door.audited("", action="rotate")
    assert record.target_id == answer.kid


def last_end(door: SignIns, answer: pb.LoginResponse) -> int:
    return door.claims(answer)["exp"]


async def test_the_private_half_is_sealed_and_erased_when_it_signs_no_more(door: SignIns) -> None:
    (row,) = await door.rows(signing_keys)
    der = door.sealer.open("signing_key", row.private_key, row.kid)
    assert der not in row.private_key and row.public_key != der
    (old,) = await kids(door)
    answer = await rotate(door, "second")
    for advance, erased in ((0, False), (ANNOUNCED_S, False), (61, True)):
        door.clock.advance(advance)
        await SessionHousekeeping(door.units, door.rotation).run_once()
        (row,) = await door.rows(signing_keys, kid=old)
        assert (row.private_key is None) is erased
    assert await kids(door) == [old, answer.kid]
    door.clock.advance(answer.others_expire_at - door.now)
    await SessionHousekeeping(door.units, door.rotation).run_once()
    assert [row.kid for row in await door.rows(signing_keys)] == [answer.kid]
    assert (await door.told()).count((identity_pb2.CHANGE_KIND_SIGNING_KEYS, old, "")) == 2


async def test_two_rotations_in_a_row_leave_one_key_that_signs(door: SignIns) -> None:
    ada = await door.add_account()
    second, third = await rotate(door, "second"), await rotate(door, "third")
    door.clock.advance(ANNOUNCED_S)
    assert door.kid(await door.login(ada.email)) == second.kid
    door.clock.advance(1)
    assert door.kid(await door.login(ada.email)) == third.kid
    door.clock.advance(third.others_expire_at - door.now)
    assert await kids(door) == [third.kid]
    assert door.kid(await door.login(ada.email)) == third.kid


async def test_a_leaked_key_is_cut_off_with_those_announced_and_the_new_one_signs_at_once(door: SignIns) -> None:
    ada = await door.add_account()
    (leaked,) = await kids(door)
    announced = await rotate(door, "second")
    before = await door.login(ada.email)
    assert door.kid(before) == leaked
    # Another process on the same database, whose clock is behind.
    behind = SignIns(door.database, FakeClock(door.clock.now() - LEEWAY_S))
    told = len(await door.told())
    answer = await rotate(door, "third", revoke_others=True)
    assert answer.others_expire_at == door.now
    assert [row.kid for row in await door.rows(signing_keys)] == [answer.kid], "no private half is left"
    changed = {(identity_pb2.CHANGE_KIND_SIGNING_KEYS, kid, "") for kid in (leaked, announced.kid, answer.kid)}
    assert set((await door.told())[told:]) == changed
    refresh_token = before.refresh_token
    for process in (door, behind):
        assert await kids(process) == [answer.kid]
        await process.keys.refresh()
        with pytest.raises(HelixError) as caught:
            process.tokens.read(before.access_token)
        assert caught.value.kind is ErrorKind.INVALID_TOKEN
        # The session goes on.
        renewed = await process.refresh(refresh_token)
        refresh_token = renewed.refresh_token
        assert process.kid(renewed) == answer.kid and process.tokens.read(renewed.access_token)
    (record,) = await door.audited("", action="rotate", target_id=answer.kid)
    assert set(json.loads(record.after)["revoked"]) == {leaked, announced.kid}
    fourth = await rotate(door, "fourth")
    door.clock.advance(ANNOUNCED_S)
    assert door.kid(await door.login(ada.email)) == fourth.kid, "the next rotation is an ordinary one"
    await behind.close()


async def test_a_rotation_elsewhere_does_not_bring_a_leaked_key_back(database: Database) -> None:
    doors = [await SignIns.open(database), SignIns(database, key="second")]
    (leaked,) = await kids(doors[0])
    answers = await asyncio.gather(
        rotate(doors[0], "third", revoke_others=True), rotate(doors[1], "fourth", revoke_others=True)
    )
    (left,) = await kids(doors[1])
    assert left in {answer.kid for answer in answers} - {leaked}
    for door in doors:
        await door.close()


async def test_without_any_key_a_sign_in_is_told_to_wait(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helixflow.auth.signing_keys._FIRST_KEY_WAIT_S", 0.01)
    door = SignIns(database)
    with pytest.raises(HelixError) as caught:
        await door.login("ada@example.com")
    assert caught.value.kind is ErrorKind.UNAVAILABLE and caught.value.retry_after_s
    await door.close()


async def test_housekeeping_forgets_what_is_long_over(door: SignIns) -> None:
    ada = await door.add_account()
    door.clock.advance(1)
    gone = await door.login(ada.email)
    await door.refresh(gone.refresh_token)
    async with refused(ErrorKind.INVALID_CREDENTIALS):
        await door.login(ada.email, WRONG)
    await door.turn_on_mfa((await door.login(ada.email)).access_token)
    assert (await door.login(ada.email)).challenge
    housekeeping = SessionHousekeeping(door.units, door.rotation)
    await housekeeping.run_once()
    assert len(await door.rows(refresh_tokens)) == 3 and len(await door.rows(one_time_tokens)) == 1
    door.clock.advance(33 * 24 * 3600)
    # All of them are over, and so is the person's own session of the harness.
    await housekeeping.run_once()
    for table in (refresh_tokens, sessions, one_time_tokens, sign_in_failures):
        assert await door.rows(table) == []
    assert (await door.login(ada.email, PASSWORD)).challenge


async def test_a_token_of_another_installation_is_none_of_ours(door: SignIns) -> None:
    ada = await door.add_account()
    answer = await door.enter(ada)
    assert door.tokens.read(answer.access_token).sub == ada.id
    elsewhere = AccessTokens(door.keys, door.clock, issuer="https://elsewhere.example", audience=AUDIENCE)
    header, payload, signature = answer.access_token.split(".")
    forged = [f"{header}.{payload}.", f"{header}.{payload}.{signature[:-8]}AAAAAAAA", f"{payload}.{header}.{signature}"]
    for reader, token in ((elsewhere, answer.access_token), *((door.tokens, token) for token in forged)):
        with pytest.raises(HelixError) as caught:
            reader.read(token)
        assert caught.value.kind is ErrorKind.INVALID_TOKEN
    door.clock.advance(ACCESS_LIFE_S + LEEWAY_S)
    async with refused(ErrorKind.INVALID_TOKEN):
        await door.ask(answer.access_token, "GetSelf", pb.GetSelfRequest())


async def test_another_master_key_is_refused_at_the_start(database: Database) -> None:
    first, other = MasterKey(bytes(32), "first.key"), MasterKey(bytes([1]) * 32, "other.key")
    await asyncio.gather(check_master_key(database, first), check_master_key(database, first))
    await check_master_key(database, first)
    with pytest.raises(UserError, match=r"other\.key: not the master key of this database") as caught:
        await check_master_key(database, other)
    assert caught.value.exit_code is ExitCode.CONFIG
