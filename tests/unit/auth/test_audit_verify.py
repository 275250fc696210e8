"""An export that was changed in any way is refused, and the first bad record is named."""

import io
import json
from base64 import urlsafe_b64encode

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from helixflow.auth.audit.lines import render
from helixflow.auth.audit.record import hash_of
from helixflow.auth.audit.signatures import parse_public_keys
from helixflow.auth.audit.verify import MAX_LINE, Broken, Verified, verify
from tests.harness.audit import build_export, build_records, new_key, pem_of

KEY = new_key()
RECORDS = build_records(6)
# header, 1, 2, checkpoint 2, 3, 4, 5, 6, checkpoint 6, end
LINES = build_export(RECORDS, KEY, checkpoints=(2, 6))
WHOLE = b"".join(LINES)


def check(*lines: bytes) -> Verified:
    return verify(io.BytesIO(b"".join(lines)))


def refuse(lines: list[bytes]) -> Broken:
    with pytest.raises(Broken) as caught:
        check(*lines)
    return caught.value


def without(number: int) -> list[bytes]:
    return [line for position, line in enumerate(LINES, 1) if position != number]


def test_what_was_not_changed_is_verified() -> None:
    verified = check(*LINES)
    assert (verified.first, verified.last, verified.records, verified.checkpoints) == (1, 6, 6, 2)
    assert verified.head_hash == RECORDS[-1].hash
    assert verified.kids == {KEY.kid}
    assert verify(io.BytesIO(WHOLE), parse_public_keys(pem_of(KEY).encode())) == verified


def test_an_empty_log_is_verified() -> None:
    assert check(*build_export([], KEY)).records == 0


@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
@settings(deadline=None, max_examples=400)
def test_any_changed_byte_is_noticed(position: int, flip: int) -> None:
    changed = bytearray(WHOLE)
    changed[position] ^= flip
    refuse([bytes(changed)])


@given(st.integers(0, len(WHOLE) - 1))
@settings(deadline=None)
def test_any_lost_or_repeated_byte_is_noticed(position: int) -> None:
    refuse([WHOLE[:position] + WHOLE[position + 1 :]])
    refuse([WHOLE[: position + 1] + WHOLE[position:]])
    refuse([WHOLE[:position]])


@pytest.mark.parametrize("number", range(1, len(LINES) + 1))
def test_any_lost_or_repeated_line_is_noticed(number: int) -> None:
    refuse(without(number))
    refuse([*LINES[:number], *LINES[number - 1 :]])


@given(st.permutations(range(len(LINES))))
@settings(deadline=None)
def test_any_other_order_is_noticed(order: list[int]) -> None:
    if order != sorted(order):
        refuse([LINES[number] for number in order])


def test_a_changed_field_names_its_record() -> None:
    lines = [*LINES]
    lines[4] = lines[4].replace(b"user_alice", b"user_malory")
    broken = refuse(lines)
    assert (broken.line, broken.sequence) == (5, 3)
    assert str(broken) == "line 5, record 3: its hash does not match: a field was changed"


def test_a_record_that_was_changed_and_hashed_anew_is_noticed_by_the_next_or_by_a_checkpoint() -> None:
    forged = replace(RECORDS[2], actor_id="user_malory")
    broken = refuse([*LINES[:4], render(replace(forged, hash=hash_of(forged).hex())), *LINES[5:]])
    assert (broken.line, broken.sequence) == (6, 4)
    assert "record 3 or this one was changed" in broken.problem
    forged = replace(RECORDS[1], actor_id="user_malory")
    broken = refuse([*LINES[:2], render(replace(forged, hash=hash_of(forged).hex())), *LINES[3:]])
    assert (broken.line, broken.sequence) == (4, 2)
    assert "not what a checkpoint was signed for" in broken.problem


def test_a_missing_record_is_named() -> None:
    broken = refuse(without(6))
    assert (broken.line, broken.sequence) == (6, 4)
    assert broken.problem == "missing: 4; record 5 follows instead"
    assert refuse([*LINES[:4], *LINES[6:]]).problem == "missing: 3 to 4; record 5 follows instead"


def test_a_moved_record_is_named() -> None:
    broken = refuse([*LINES[:4], LINES[5], LINES[4], *LINES[6:]])
    assert (broken.line, broken.sequence) == (5, 3)
    assert broken.problem == "out of order: it comes later, on line 6"


def test_a_duplicate_is_named() -> None:
    broken = refuse([*LINES[:5], *LINES[4:]])
    assert (broken.line, broken.sequence) == (6, 3)
    assert broken.problem == "a duplicate, or out of order"


def test_a_cut_end_is_named() -> None:
    assert "the end is missing" in refuse(LINES[:-1]).problem
    assert refuse(LINES[:-1]).sequence == 7
    assert "the line is cut off" in refuse([WHOLE[:-1]]).problem
    broken = refuse([*LINES[:7], LINES[-1]])
    assert (broken.line, broken.sequence) == (8, 6)
    assert "the end is signed for record 6" in broken.problem


def test_a_missing_checkpoint_is_noticed() -> None:
    assert refuse(without(4)).problem == "6 records and 2 checkpoints were exported, 6 and 1 are here"


def test_an_end_of_another_export_is_noticed() -> None:
    assert "the end is out of order" in refuse([*LINES[:-1], build_export(RECORDS[:2], KEY)[-1]]).problem
    other = build_export(build_records(6, actor_id="user_bob"), KEY, checkpoints=(2, 6))
    assert "not what the end was signed for" in refuse([*without(9)[:-1], other[-1]]).problem


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"hello\n", "no JSON"),
        (b"\n", "no JSON"),
        (b"\xff\xfe\n", "no JSON"),
        (b"[" * 100_000 + b"\n", "no JSON"),
        (b'{"type":"other"}\n', "not a line of an audit log"),
        (LINES[1].replace(b'":"', b'": "', 1), "not written as an export writes it"),
        (LINES[1].replace(b"{", b'{"at":1,', 1), "not written as an export writes it"),
        (LINES[1].replace(b"user_alice", b"\\ud800"), "changed"),
        (b'"' + b"a" * MAX_LINE, "longer than"),
        (LINES[0], "a second header"),
    ],
)
def test_other_lines_are_refused(line: bytes, problem: str) -> None:
    broken = refuse([LINES[0], line, *LINES[1:]])
    assert broken.line == 2
    assert problem in broken.problem


def test_what_is_no_export_is_refused() -> None:
    assert "the file is empty" in refuse([]).problem
    assert "begins with a header" in refuse(LINES[1:]).problem
    assert "version 2, is not known" in refuse([LINES[0].replace(b'"version":1', b'"version":2')]).problem
    assert refuse([*LINES, LINES[1]]).problem == "something follows after the end"


def test_a_changed_header_is_noticed() -> None:
    broken = refuse([LINES[0].replace(b'"since":0', b'"since":1'), *LINES[1:]])
    assert (broken.line, broken.problem) == (1, "the header was changed: the end is signed for another one")


def test_a_log_of_another_organisation_does_not_mix() -> None:
    other = build_records(6, organisation_id="org_2")
    assert "another organisation" in refuse([LINES[0], render(other[0])]).problem


def test_a_log_signed_anew_by_somebody_else_is_only_noticed_with_the_key_at_hand() -> None:
    forger = new_key()
    forged = build_export(build_records(6, actor_id="user_malory"), forger, checkpoints=(2,))
    assert check(*forged).kids == {forger.kid}
    with pytest.raises(Broken, match=f"unknown key \\({forger.kid}\\)"):
        verify(io.BytesIO(b"".join(forged)), parse_public_keys(pem_of(KEY).encode()))


def test_keys_must_be_what_their_ids_say() -> None:
    header = json.loads(LINES[0])
    for keys, problem in (
        ({"0" * 32: pem_of(KEY)}, "another one than its id says"),
        ({KEY.kid: "nothing"}, "cannot be read"),
    ):
        line = json.dumps({**header, "keys": keys}, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        assert problem in refuse([line, *LINES[1:]]).problem


def test_keys_come_as_pem_jwk_or_sets_of_them() -> None:
    other = new_key()
    numbers = KEY.private.public_key().public_numbers()
    jwk = {"kty": "EC", "crv": "P-256", "x": _base64url(numbers.x), "y": _base64url(numbers.y)}
    both = (pem_of(KEY) + "# a comment\n" + pem_of(other)).encode()
    assert set(parse_public_keys(both)) == {KEY.kid, other.kid}
    assert set(parse_public_keys(json.dumps(jwk).encode())) == {KEY.kid}
    assert set(parse_public_keys(json.dumps({"keys": [jwk]}).encode())) == {KEY.kid}


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b"1", b'{"keys":[]}', b'{"keys":3}', b"-----BEGIN PUBLIC KEY-----"]
)
def test_what_is_no_key_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="key"):
        parse_public_keys(text)


def test_keys_of_another_kind_are_refused() -> None:
    for public in (
        rsa.generate_private_key(65537, 2048).public_key(),
        ec.generate_private_key(ec.SECP384R1()).public_key(),
    ):
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        with pytest.raises(ValueError, match="P-256"):
            parse_public_keys(pem)


def _base64url(number: int) -> str:
    return urlsafe_b64encode(number.to_bytes(32)).decode().rstrip("=")
