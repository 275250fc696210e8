import base64

import pytest

from helixflow.auth.totp import (
    RECOVERY_CODES,
    code_at,
    enrolment_uri,
    matching_step,
    new_recovery_codes,
    new_secret,
    recovery_hash,
    secret_text,
)

# RFC 6238, appendix B, SHA-1: eight digits there, of which six are used here.
SECRET = b"12345678901234567890"
VECTORS = {
    59: "94287082",
    1111111109: "07081804",
    1111111111: "14050471",
    1234567890: "89005924",
    2000000000: "69279037",
    20000000000: "65353130",
}


@pytest.mark.parametrize(("now", "digits"), VECTORS.items())
def test_codes_are_those_of_the_rfc(now: int, digits: str) -> None:
    assert code_at(SECRET, now // 30) == digits[-6:]
    assert matching_step(SECRET, digits[-6:], now, 0) == now // 30


def test_a_step_more_or_less_is_tolerated_and_no_more() -> None:
    step = 50_000_000
    for off in (-2, -1, 0, 1, 2):
        found = matching_step(SECRET, code_at(SECRET, step + off), step * 30 + 7, 0)
        assert found == (step + off if abs(off) <= 1 else None)


def test_a_step_is_used_once_and_none_before_it() -> None:
    step = 50_000_000
    for used in (step, step + 1):
        assert matching_step(SECRET, code_at(SECRET, step), step * 30, used) is None
    assert matching_step(SECRET, code_at(SECRET, step), step * 30, step - 1) == step


@pytest.mark.parametrize("code", ["", "12345", "1234567", "abcdef", "١٢٣٤٥٦", "-12345", "12345\0", "²²²²²²"])
def test_what_is_no_code_is_wrong(code: str) -> None:
    assert matching_step(SECRET, code, 1_700_000_000, 0) is None


def test_a_code_may_be_typed_with_a_space() -> None:
    assert matching_step(SECRET, " 287 082 ", 59, 0) == 1


def test_a_secret_is_long_enough_and_can_be_typed() -> None:
    secret = new_secret()
    assert len(secret) == 20 != new_secret() and base64.b32decode(secret_text(secret)) == secret
    assert f"secret={secret_text(secret)}&" in enrolment_uri(secret, "ada+x@example.com")
    assert "ada%2Bx%40example.com?" in enrolment_uri(secret, "ada+x@example.com")


def test_recovery_codes_are_different_and_forgiving() -> None:
    codes = new_recovery_codes()
    assert len({recovery_hash(code) for code in codes}) == RECOVERY_CODES
    assert all(len(code.replace("-", "")) == 16 for code in codes)
    assert recovery_hash(codes[0]) == recovery_hash(f" {codes[0].replace('-', '').upper()} ")
