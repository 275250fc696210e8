import asyncio
import unicodedata
from collections.abc import AsyncIterator

import pytest

from helixflow.auth.common_passwords import CommonPasswords
from helixflow.auth.password_rules import PasswordRules
from helixflow.auth.passwords import MAX_PASSWORD_BYTES, Passwords
from helixflow.core.clock import SystemClock
from helixflow.core.errors import ErrorKind, HelixError

GOOD = "vK3#9dLq2!xZ"
RULES = PasswordRules(12, CommonPasswords())


@pytest.fixture
async def passwords() -> AsyncIterator[Passwords]:
    passwords = Passwords(RULES, SystemClock(), workers=1)
    yield passwords
    passwords.close()


def check(password: str, email: str = "ada.lovelace@example.com", name: str = "Ada Lovelace") -> None:
    RULES.check(password, email=email, name=name)


async def test_a_hash_is_argon2id_as_decided_and_verifies(passwords: Passwords) -> None:
    stored = await passwords.hash_new(GOOD, email="a@example.com", name="Ada")
    assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$") and GOOD not in stored
    assert await passwords.verify(GOOD, stored) and not await passwords.verify(GOOD + " ", stored)
    assert not passwords.is_outdated(stored)
    assert passwords.is_outdated(stored.replace("t=2", "t=1"))
    assert stored != await passwords.rehash(GOOD)


@pytest.mark.parametrize("stored", [None, "", "nonsense", "$argon2id$v=19$m=19456,t=2,p=1$AAAA$AAAA"])
async def test_nothing_matches_what_is_no_hash(passwords: Passwords, stored: str | None) -> None:
    for password in ("", GOOD):
        assert not await passwords.verify(password, stored)


async def test_the_same_characters_are_the_same_password(passwords: Passwords) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Ünïcödé pässphräse Ω½ｆ") for form in ("NFC", "NFD"))
    assert composed != decomposed
    stored = await passwords.hash_new(composed, email="a@example.com", name="Ada")
    assert await passwords.verify(decomposed, stored)


async def test_too_long_is_refused_before_anything_is_done(passwords: Passwords) -> None:
    longest = "ä" * (MAX_PASSWORD_BYTES // 2 - 1) + "bc"
    assert not await passwords.verify(longest, None)
    for refused in (passwords.verify(longest + "d", None), passwords.hash_new(longest + "d", email="", name="")):
        with pytest.raises(HelixError) as caught:
            await refused
        assert (caught.value.kind, caught.value.param) == (ErrorKind.UNPROCESSABLE, "password")


async def test_when_too_many_wait_the_next_is_sent_away_at_once(passwords: Passwords) -> None:
    waiting = [asyncio.create_task(passwords.verify(GOOD, None)) for _ in range(200)]
    await asyncio.sleep(0)
    done = [task for task in waiting if task.done()]
    errors = [task.exception() for task in done]
    assert 60 < len(done) < 150
    assert all(isinstance(error, HelixError) and error.kind is ErrorKind.TOO_MANY_ATTEMPTS for error in errors)
    assert all(isinstance(error, HelixError) and (error.retry_after_s or 0) >= 1 for error in errors)
    passwords.close()
    await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize(
    "password",
    [
        *("", "short", "elevenchars"),
        *("password1234", "P@ssw0rd1234", "Password123!", "drowssap1234", "passwordpassword", "iloveyou1234"),
        *("123456789012", "111111111111", "abcabcabcabc", "qwertyuiop12", "1qaz2wsx3edc", "1q2w3e4r5t6y"),
        *("Sommer2024!!", "michael19841984", "Liverpool-Chelsea-99", "monkey banana", "йцукенгшщзхъ", "!!!!!!!!!!!!"),
        *("ada.lovelace@example.com", "ADA.LOVELACE@example.com1", "Ada Lovelace!", "adalovelace12", "helixflow1234"),
    ],
)
def test_a_bad_choice_is_refused(password: str) -> None:
    with pytest.raises(HelixError) as caught:
        check(password)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.UNPROCESSABLE, "password")
    assert not password or password not in caught.value.message


@pytest.mark.parametrize(
    "password",
    [
        GOOD,
        "purple monkey dishwasher",
        "Tr0ub4dor&3-xyz",
        "ada likes long walks",
        "пароль от сейфа дома",
        "長い長いパスワードです東京",
    ],
)
def test_a_good_choice_is_taken(password: str) -> None:
    check(password)


def test_the_list_stands_for_many_passwords() -> None:
    assert len(CommonPasswords()) > 50_000


def test_somebody_with_a_short_name_may_use_its_letters() -> None:
    check("this is about ada", email="a@b.example", name="Ada")


def test_whatever_is_asked_gets_an_answer() -> None:
    common = CommonPasswords()
    for text in ("", "\0", "😀" * 12, "﷽" * 30, "a" * 5000, " " * 20, "\ud7ff\U0010ffff"):
        assert (text in common) in (True, False)
