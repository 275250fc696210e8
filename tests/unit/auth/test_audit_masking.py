"""Nothing that looks like a secret gets into a record, and nothing that cannot be stored."""

import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.auth.audit.masking import MAX_ITEMS, MAX_STATE, MAX_TEXT, plain, state_text
from helixflow.core.keys import CHALLENGE_PREFIX, PREFIX, REFRESH_PREFIX, TOKEN_PREFIX, generate_key, mask_key

JWT = "eyJhbGciOiJSUzI1NiIsImtpZCI6ImsxIn0.eyJzdWIiOiJ1c2VyXzEifQ.c2lnbmF0dXJlLW9mLXRoZS10b2tlbg"
PEM = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIBq2tp0pXlE8\n-----END EC PRIVATE KEY-----"
ARGON = "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ$aGFzaGhhc2hoYXNo"


@pytest.mark.parametrize("prefix", [PREFIX, REFRESH_PREFIX, TOKEN_PREFIX, CHALLENGE_PREFIX])
def test_our_own_secrets_are_masked_wherever_they_stand(prefix: str) -> None:
    secret = generate_key(prefix)
    assert plain(secret) == f"{prefix}***"
    assert plain(f"use {secret}, and ({secret[:30]})") == f"use {prefix}***, and ({prefix}***)"
    assert secret[4:] not in state_text({"list": [{"deep": secret}], secret: 1})


@pytest.mark.parametrize("secret", [JWT, PEM, ARGON, "otpauth://totp/x?secret=JBSWY3DPEHPK3PXP"])
def test_other_secrets_are_masked(secret: str) -> None:
    assert plain(f"a {secret} b") in ("a *** b", "a ***")


def test_the_hint_of_a_key_stays() -> None:
    hint = mask_key(generate_key())
    assert plain(hint) == hint


@pytest.mark.parametrize(
    "name", ["password", "new_password", "totpSecret", "X-Auth-Token", "api_key", "recovery_codes"]
)
def test_fields_that_are_called_secret_are_masked_whatever_they_hold(name: str) -> None:
    for value in ("hunter2", ["a"], {"b": "c"}):
        assert json.loads(state_text({name: value})) == {name: "***"}


def test_what_says_nothing_about_a_secret_is_kept() -> None:
    state = {"token_expires_at": 5, "password": True, "secret": "", "codes": [], "key_id": "key_1", "token": None}
    assert json.loads(state_text(state)) == state
    assert json.loads(state_text({"code": 123456})) == {"code": "***"}


def test_no_state_is_told_from_an_empty_one() -> None:
    assert state_text(None) == ""
    assert state_text({}) == "{}"


def test_values_become_json() -> None:
    class Colour(Enum):
        RED = "red"

    state: Mapping[str, Any] = {"a": (1, 2.5, None), "b": {"y", "x"}, "c": Colour.RED, "d": float("nan"), "e": "Förde"}
    assert state_text(state) == '{"a":[1,2.5,null],"b":["x","y"],"c":"red","d":"nan","e":"Förde"}'
    with pytest.raises(TypeError, match="bytes"):
        state_text({"a": b"x"})


def test_long_text_is_cut_with_a_mark() -> None:
    cut = plain("a" * 5000)
    assert cut == "a" * MAX_TEXT + "… (5000 characters)"
    # Also where masking alone made it short: what was behind is gone.
    assert plain(" ".join(generate_key() for _ in range(200))).endswith("… (10199 characters)")


def test_large_states_are_bounded() -> None:
    many = json.loads(state_text({"models": ["m"] * 700}))["models"]
    assert len(many) == MAX_ITEMS + 1
    assert many[-1] == "… and 200 more"
    fields = json.loads(state_text({str(number): 1 for number in range(700)}))
    assert fields["…"] == "and 200 more"
    deep: Any = "x"
    for _ in range(1000):
        deep = [deep]
    assert "…" in state_text({"deep": deep})
    huge = state_text({"names": ["ö" * 900] * 100})
    assert json.loads(huge) == {"…": "too large to record: 180311 bytes"}
    assert len(huge) < MAX_STATE


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_can_be_stored(text: str) -> None:
    stored = plain(text)
    assert "\0" not in stored
    assert stored.encode().decode() == stored
    assert json.loads(state_text({"\0list": [text], text: 1}))["\ufffdlist"] == [stored]


def test_masking_takes_no_time_worth_an_attack() -> None:
    for text in ("eyJ" * 400_000, "hfk_" * 300_000, "-----BEGIN " + "A " * 500_000, "$argon2" * 100_000):
        assert len(plain(text)) <= MAX_TEXT + 30
