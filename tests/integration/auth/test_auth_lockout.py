"""Guessing passwords: what it costs, whom it locks out, and that it can be found out nowhere who has an account."""

import asyncio
import statistics
import time

import pytest

from helixflow.auth.failure_tally import BY_ADDRESS, BY_EMAIL, FORGOTTEN_AFTER_S, HALVING_S
from helixflow.auth.housekeeping import SessionHousekeeping
from helixflow.auth.lockout import ABANDONED_AFTER_S, Lockout
from helixflow.auth.passwords import Passwords
from helixflow.core.errors import HelixError
from helixflow.storage.schema import sign_in_attempts, sign_in_failures
from tests.harness.sessions import PASSWORD, WRONG, SignIns

EMAIL_FAILURES, ADDRESS_FAILURES = BY_EMAIL.failures, BY_ADDRESS.failures
OFFICE = "198.51.100.1"


async def outcome(door: SignIns, email: str, password: str = WRONG, address: str = "") -> tuple[str, float | None]:
    try:
        await door.login(email, password, address=address)
    except HelixError as exc:
        return exc.code, exc.retry_after_s
    return "in", None


async def fail(door: SignIns, times: int, address: str) -> None:
    """Without the work; `{}` in the address becomes a number."""
    lockout = Lockout(door.sealer)
    async with door.system() as unit:
        for number in range(times):
            await lockout.fail(unit, lockout.attempt(f"user{number}@example.net", address.format(number)))


WRONG_ONE = ("invalid_credentials", None)


async def test_five_failures_lock_and_each_further_one_locks_longer(door: SignIns) -> None:
    ada = await door.add_account()
    for email in (ada.email, "nobody@example.com"):
        for _ in range(EMAIL_FAILURES):
            assert await outcome(door, email) == WRONG_ONE
        for wait_s in (1, 2, 4):
            assert await outcome(door, email, PASSWORD) == ("too_many_attempts", wait_s)
            door.clock.advance(wait_s)
            assert await outcome(door, email) == WRONG_ONE
    assert await outcome(door, ada.email, PASSWORD) == ("too_many_attempts", 8 - 7)


async def test_signing_in_forgives_the_email(door: SignIns) -> None:
    ada = await door.add_account()
    for _ in range(3):
        for _ in range(EMAIL_FAILURES - 1):
            assert await outcome(door, ada.email) == WRONG_ONE
        assert await outcome(door, ada.email.upper(), PASSWORD) == ("in", None)


async def test_failures_are_forgotten_after_a_day(door: SignIns) -> None:
    await door.add_account()
    for _ in range(EMAIL_FAILURES):
        await outcome(door, "ada@example.com")
    door.clock.advance(FORGOTTEN_AFTER_S)
    for _ in range(EMAIL_FAILURES - 1):
        assert await outcome(door, "ada@example.com") == WRONG_ONE
    assert await outcome(door, "ada@example.com", PASSWORD) == ("in", None)


async def test_an_address_that_tries_many_emails_is_locked_and_only_that(door: SignIns) -> None:
    ada = await door.add_account()
    await door.set(ada, last_login_at=door.now)
    await fail(door, ADDRESS_FAILURES - 1, "2001:db8:1:2::{}")
    # One's own account is no way to start anew.
    assert await outcome(door, ada.email, PASSWORD, "2001:db8:1:2::7") == ("in", None)
    assert await outcome(door, "last@example.com", "x", "2001:db8:1:2::1") == WRONG_ONE
    assert await outcome(door, ada.email, PASSWORD, "2001:db8:1:2:ffff::9") == ("too_many_attempts", 1)
    assert await outcome(door, ada.email, PASSWORD, "2001:db8:1:3::1") == ("in", None)


async def test_people_who_share_an_address_with_many_failures_get_in_all_at_once(door: SignIns) -> None:
    people = [await door.add_account(f"user{number}@example.com") for number in range(6)]
    await fail(door, ADDRESS_FAILURES, OFFICE)
    assert await outcome(door, people[0].email, PASSWORD, OFFICE) == ("too_many_attempts", 1)
    door.clock.advance(1)
    entered = await asyncio.gather(*(outcome(door, person.email, PASSWORD, OFFICE) for person in people))
    assert entered == [("in", None)] * 6
    # Each of them made up for one failure: so many may be wrong again before the address is locked.
    for number in range(6):
        assert await outcome(door, f"nobody{number}@example.com", address=OFFICE) == WRONG_ONE
    assert (await outcome(door, people[0].email, PASSWORD, OFFICE))[0] == "too_many_attempts"


async def test_a_forgotten_program_at_an_address_locks_nobody_else_out(door: SignIns) -> None:
    ada = await door.add_account()
    for _ in range(24 * 4):
        door.clock.advance(15 * 60)
        await fail(door, 1, OFFICE)
    await door.set(ada, last_login_at=door.now)
    assert await outcome(door, ada.email, PASSWORD, OFFICE) == ("in", None)


async def test_failures_of_an_address_halve_every_hour_and_ones_own_sign_ins_change_nothing(door: SignIns) -> None:
    ada = await door.add_account()
    await door.set(ada, last_login_at=door.now)
    await fail(door, ADDRESS_FAILURES, OFFICE)
    door.clock.advance(HALVING_S - 1)
    for _ in range(3):
        assert await outcome(door, ada.email, PASSWORD, OFFICE) == ("in", None)
    await fail(door, ADDRESS_FAILURES // 2 - 1, OFFICE)
    assert await outcome(door, ada.email, PASSWORD, OFFICE) == ("in", None)
    await fail(door, 1, OFFICE)
    assert await outcome(door, ada.email, PASSWORD, OFFICE) == ("too_many_attempts", 1)


async def test_attempts_whose_process_died_were_failures(door: SignIns) -> None:
    ada = await door.add_account()
    lockout = Lockout(door.sealer)
    async with door.system() as unit:
        for _ in range(EMAIL_FAILURES):
            assert await lockout.reserve(unit, lockout.attempt(ada.email, ""))
        assert not await lockout.admits(unit.connection, lockout.attempt(ada.email, ""), unit.now)
    door.clock.advance(ABANDONED_AFTER_S)
    await SessionHousekeeping(door.units, door.rotation).run_once()
    assert await door.rows(sign_in_attempts) == []
    assert await outcome(door, ada.email, PASSWORD) == ("too_many_attempts", 1)
    door.clock.advance(1)
    assert await outcome(door, ada.email, PASSWORD) == ("in", None)


async def test_many_guesses_at_once_are_no_more_guesses(door: SignIns, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = await door.add_account()
    tried = 0
    verify = Passwords.verify

    async def counting(self: Passwords, *arguments: str) -> bool:
        nonlocal tried
        tried += 1
        return await verify(self, *arguments)

    monkeypatch.setattr(Passwords, "verify", counting)
    guesses = [outcome(door, ada.email, f"{WRONG} {number}") for number in range(12)]
    outcomes = await asyncio.gather(*guesses, outcome(door, ada.email, PASSWORD))
    assert tried == EMAIL_FAILURES
    assert outcomes.count(WRONG_ONE) == EMAIL_FAILURES
    assert outcomes.count(("too_many_attempts", 1)) == 13 - EMAIL_FAILURES
    assert await door.rows(sign_in_attempts) == []


async def test_another_process_on_the_same_database_knows(door: SignIns) -> None:
    ada = await door.add_account()
    for _ in range(EMAIL_FAILURES):
        await outcome(door, ada.email)
    second = SignIns(door.database, door.clock)
    assert (await outcome(second, ada.email, PASSWORD))[0] == "too_many_attempts"
    await second.close()


async def test_who_is_locked_out_waits_for_nobody_who_writes(door: SignIns) -> None:
    ada = await door.add_account()
    for _ in range(EMAIL_FAILURES):
        await outcome(door, ada.email)
    async with door.system(), asyncio.timeout(30):
        assert (await outcome(door, ada.email, PASSWORD))[0] == "too_many_attempts"


async def test_the_start_of_a_lock_is_recorded_and_what_it_stops_is_not(door: SignIns) -> None:
    ada = await door.add_account()
    for _ in range(EMAIL_FAILURES + 10):
        await outcome(door, ada.email)
    records = await door.audited(ada.organisation_id)
    assert len(records) == EMAIL_FAILURES
    assert records[-1].after == f'{{"failures":{EMAIL_FAILURES},"locked_s":1}}'
    assert records[-2].after == f'{{"failures":{EMAIL_FAILURES - 1},"locked_s":0}}'


async def test_the_table_of_failures_names_nobody(door: SignIns) -> None:
    await outcome(door, "ada@example.com", address="192.0.2.77")
    rows = await door.rows(sign_in_failures)
    assert len(rows) == 2 and "ada" not in f"{rows}" and "192.0.2.77" not in f"{rows}"


async def test_when_too_many_wait_nobody_is_blamed(door: SignIns) -> None:
    ada = await door.add_account()
    door.passwords._pending = 10_000
    assert (await outcome(door, ada.email, PASSWORD))[0] == "too_many_attempts"
    door.passwords._pending = 0
    assert await door.rows(sign_in_failures) == await door.rows(sign_in_attempts) == []
    assert await outcome(door, ada.email, PASSWORD) == ("in", None)


# The time goes into the hash, not into the database.
@pytest.mark.parametrize("database_settings", ["sqlite"], indirect=True)
async def test_an_unknown_email_takes_as_long_as_a_wrong_password(door: SignIns) -> None:
    ada = await door.add_account()
    await door.add_account("bob@example.com", password=False)
    emails = {"wrong": ada.email, "unknown": "nobody@example.com", "without": "bob@example.com"}
    times: dict[str, list[float]] = {name: [] for name in emails}
    for _ in range(31):
        # Interleaved, so that the machine's moods fall on all alike; a day later, so that nobody is locked out.
        for name, email in emails.items():
            began = time.perf_counter()
            assert await outcome(door, email) == WRONG_ONE
            times[name].append(time.perf_counter() - began)
        door.clock.advance(FORGOTTEN_AFTER_S)
    medians = {name: statistics.median(found) for name, found in times.items()}
    # Without the hash it would be more than tenfold.
    assert max(medians.values()) < 3 * min(medians.values()), medians
