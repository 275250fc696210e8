"""Everything that is not a token of ours is refused, whatever it looks like; and no refusal says what was in it."""

import hmac
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS, PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256, SHA512
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from helixflow.clients.changes import ChangeWatch
from helixflow.clients.jws import parse_token
from helixflow.clients.tokens import TokenVerifier
from helixflow.core.claims import MAX_TOKEN_BYTES
from helixflow.core.clock import FakeClock
from helixflow.core.errors import HelixError
from tests.harness.tokens import TokenMint, base64url, snapshot

CLOCK = FakeClock()
MINT = TokenMint(now=CLOCK.now())
STRANGER = TokenMint("stranger", now=CLOCK.now())


class _NoChannel:
    def unary_unary(self, method: str, **_: object) -> None:
        return None

    unary_stream = unary_unary


@pytest.fixture(scope="module")
def verifier() -> TokenVerifier:
    watch = ChangeWatch(_NoChannel(), clock=CLOCK)  # type: ignore[arg-type]
    verifier = TokenVerifier(watch, size=100, grace_s=300, clock=CLOCK)
    watch._on_message(snapshot(10, [MINT.public]), True)
    return verifier


def verdict(verifier: TokenVerifier, token: bytes) -> str:
    """`accepted`, or the code of the refusal; which shows nothing of the token."""
    try:
        verifier.verify(token)
    except HelixError as exc:
        assert exc.__cause__ is None
        assert exc.__context__ is None or exc.__suppress_context__
        assert all(part not in exc.message for part in ("acc_1", "Ada", "ses_1"))
        return exc.code
    return "accepted"


def signed_by_public_key(header: dict[str, Any], secret: bytes) -> bytes:
    """HS256 over what everybody knows: the confusion that `alg` invites."""
    signed = base64url(msgspec.json.encode(header)) + b"." + base64url(msgspec.json.encode(MINT.claims()))
    return signed + b"." + base64url(hmac.digest(secret, signed, sha256))


def with_signature(sign: Callable[[bytes], bytes], **header: str) -> bytes:
    signed = base64url(msgspec.json.encode({**MINT.header, **header})) + b"."
    signed += base64url(msgspec.json.encode(MINT.claims()))
    return signed + b"." + base64url(sign(signed))


def unsigned(alg: str, signature: bytes = b"") -> bytes:
    header = base64url(msgspec.json.encode({**MINT.header, "alg": alg}))
    return header + b"." + base64url(msgspec.json.encode(MINT.claims())) + b"." + signature


_PUBLIC = MINT.key.public_key()
_JWK = {"kty": "RSA", "n": base64url(STRANGER.public.modulus).decode(), "e": "AQAB"}
_PARTS = MINT.token().split(b".")

FORGERIES: dict[str, bytes] = {
    "alg none, no signature": unsigned("none"),
    "alg none in capitals": unsigned("None", b"AA"),
    "alg none with the real signature": unsigned("none", _PARTS[2]),
    "RS256 without signature": _PARTS[0] + b"." + _PARTS[1] + b".",
    "HS256 with the public key (PEM)": signed_by_public_key(
        {**MINT.header, "alg": "HS256"}, _PUBLIC.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    ),
    "HS256 with the public key (DER)": signed_by_public_key(
        {**MINT.header, "alg": "HS256"}, _PUBLIC.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    ),
    "HS256 with the modulus": signed_by_public_key({**MINT.header, "alg": "HS256"}, MINT.public.modulus),
    "HMAC under the name RS256": signed_by_public_key(MINT.header, MINT.public.modulus),
    "RS512": with_signature(lambda data: MINT.key.sign(data, PKCS1v15(), SHA512()), alg="RS512"),
    "SHA-512 under the name RS256": with_signature(lambda data: MINT.key.sign(data, PKCS1v15(), SHA512())),
    "PS256": with_signature(lambda data: MINT.key.sign(data, PSS(MGF1(SHA256()), 32), SHA256()), alg="PS256"),
    "PSS under the name RS256": with_signature(lambda data: MINT.key.sign(data, PSS(MGF1(SHA256()), 32), SHA256())),
    "alg rs256": MINT.sign(MINT.claims(), {**MINT.header, "alg": "rs256"}),
    "another key under our kid": STRANGER.sign(STRANGER.claims(), MINT.header),
    "another key under its own kid": STRANGER.token(),
    "unknown kid": MINT.sign(MINT.claims(), {**MINT.header, "kid": "key-9"}),
    "empty kid": MINT.sign(MINT.claims(), {**MINT.header, "kid": ""}),
    "kid as a path": MINT.sign(MINT.claims(), {**MINT.header, "kid": "../../key-1"}),
    "kid as a number": MINT.sign(MINT.claims(), {**MINT.header, "kid": 1}),
    "no kid": MINT.sign(MINT.claims(), {"alg": "RS256", "typ": "at+jwt"}),
    "no typ": MINT.sign(MINT.claims(), {"alg": "RS256", "kid": "key-1"}),
    "typ JWT": MINT.sign(MINT.claims(), {**MINT.header, "typ": "JWT"}),
    "typ in capitals": MINT.sign(MINT.claims(), {**MINT.header, "typ": "AT+JWT"}),
    "its own key (jwk)": STRANGER.sign(STRANGER.claims(), {**MINT.header, "jwk": _JWK}),
    "a key elsewhere (jku)": MINT.sign(MINT.claims(), {**MINT.header, "jku": "https://example.org/jwks.json"}),
    "a certificate elsewhere (x5u)": MINT.sign(MINT.claims(), {**MINT.header, "x5u": "https://example.org/a.pem"}),
    "its own certificate (x5c)": MINT.sign(MINT.claims(), {**MINT.header, "x5c": ["MIIB"]}),
    "critical extensions": MINT.sign(MINT.claims(), {**MINT.header, "crit": ["b64"], "b64": False}),
    "a compressed payload": MINT.sign(MINT.claims(), {**MINT.header, "zip": "DEF"}),
    "a header that is a list": MINT.sign_parts(b'["RS256"]', msgspec.json.encode(MINT.claims())),
    "claims that are a list": MINT.sign_parts(msgspec.json.encode(MINT.header), b"[]"),
    "claims that are no JSON": MINT.sign_parts(msgspec.json.encode(MINT.header), b"\xff"),
    "wrong iss": MINT.token(iss="evil"),
    "wrong aud": MINT.token(aud="another-api"),
    "several aud": MINT.token(aud=["helixflow-api", "other"]),
    "empty aud": MINT.token(aud=""),
    "expired": MINT.token(iat=MINT.now - 3700, nbf=MINT.now - 3700, exp=MINT.now - 6),
    "future nbf": MINT.token(nbf=MINT.now + 6),
    "future iat": MINT.token(iat=MINT.now + 6, exp=MINT.now + 60),
    "lives too long": MINT.token(exp=MINT.now + 3601),
    "expires before it begins": MINT.token(exp=MINT.now - 1),
    "expires at infinity": MINT.sign_parts(
        msgspec.json.encode(MINT.header), msgspec.json.encode(MINT.claims(exp=0)).replace(b'"exp":0', b'"exp":1e400')
    ),
    "exp as text": MINT.token(exp=str(MINT.now + 60)),
    "exp as an enormous number": MINT.sign_parts(
        msgspec.json.encode(MINT.header),
        msgspec.json.encode(MINT.claims(exp=0)).replace(b'"exp":0', b'"exp":' + b"9" * 400),
    ),
    "no subject": MINT.token(sub=""),
    "no session": MINT.token(sid=""),
    "rev as text": MINT.token(rev="99"),
    "rev as true": MINT.token(rev=True),
    "padding": MINT.token() + b"==",
    "a fourth part": MINT.token() + b".AAAA",
    "white space before": b" " + MINT.token(),
    "a line end after": MINT.token() + b"\n",
    "a space within": MINT.token().replace(b".", b" .", 1),
    "the standard alphabet": b"+" + MINT.token()[1:],
    "an empty header": b"." + _PARTS[1] + b"." + _PARTS[2],
    "an empty payload": _PARTS[0] + b".." + _PARTS[2],
    "two parts": _PARTS[0] + b"." + _PARTS[1],
    "only dots": b"..",
    "nothing": b"",
    "a signature with a byte more": MINT.token()[: -len(_PARTS[2])] + base64url(b"\0" + MINT.key.sign(
        _PARTS[0] + b"." + _PARTS[1], PKCS1v15(), SHA256()
    )),
    "a changed payload": _PARTS[0] + b"." + base64url(msgspec.json.encode(MINT.claims(sub="acc_2"))) + b"." + _PARTS[2],
    "a nested bomb": base64url(b"[" * 5000) + b"." + _PARTS[1] + b"." + _PARTS[2],
    "a signed nested bomb": MINT.sign_parts(
        msgspec.json.encode(MINT.header), b'{"x":' + b"[" * 4000 + b"]" * 4000 + b"}"
    )[:MAX_TOKEN_BYTES],
    "too long": MINT.token(name="x" * MAX_TOKEN_BYTES),
}  # fmt: skip


def test_the_real_one_is_accepted(verifier: TokenVerifier) -> None:
    assert verdict(verifier, MINT.token()) == "accepted"
    assert verdict(verifier, MINT.token(iat=MINT.now + 5, nbf=MINT.now + 5, exp=MINT.now + 60)) == "accepted"
    assert verdict(verifier, MINT.token(iat=MINT.now - 3600, exp=MINT.now - 4)) == "accepted"


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_is_refused(verifier: TokenVerifier, name: str) -> None:
    assert verdict(verifier, FORGERIES[name]) == "invalid_token"


@pytest.mark.parametrize("claim", sorted(set(MINT.claims()) - {"name"}))
def test_every_claim_is_needed(verifier: TokenVerifier, claim: str) -> None:
    claims = MINT.claims()
    del claims[claim]
    assert verdict(verifier, MINT.sign(claims)) == "invalid_token"


def test_unused_bits_at_the_end_of_a_part_are_no_second_spelling(verifier: TokenVerifier) -> None:
    token = MINT.token()
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    spellings = [token[:-1] + bytes([last]) for last in alphabet]
    assert [one for one in spellings if verdict(verifier, one) == "accepted"] == [token]


@given(st.binary(max_size=200))
def test_bytes_are_refused_and_nothing_else_happens(verifier: TokenVerifier, token: bytes) -> None:
    assert verdict(verifier, token) == "invalid_token"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def _encoded(value: Any) -> bytes:
    return msgspec.json.encode(value)


@given(st.dictionaries(st.sampled_from(["alg", "typ", "kid", "crit", "jku", "x"]), _JSON | st.just("RS256")))
def test_any_header_but_ours_is_refused(verifier: TokenVerifier, header: dict[str, Any]) -> None:
    assert verdict(verifier, MINT.sign_parts(_encoded(header), _encoded(MINT.claims()))) == "invalid_token"


@given(st.sampled_from(sorted(set(MINT.claims()) - {"name", "scope", "jti", "project", "org", "roles"})), _JSON)
def test_any_value_in_a_claim_that_decides_is_judged_without_a_crash(
    verifier: TokenVerifier, claim: str, value: Any
) -> None:
    assert verdict(verifier, MINT.token(**{claim: value})) in ("accepted", "invalid_token")


@given(st.integers(0, len(MINT.token()) - 1), st.integers(0, 255))
def test_a_token_with_one_byte_changed_is_refused(verifier: TokenVerifier, position: int, value: int) -> None:
    token = MINT.token()
    changed = token[:position] + bytes([value]) + token[position + 1 :]
    assert (verdict(verifier, changed) == "accepted") is (changed == token)


@given(st.text(max_size=300).map(str.encode) | st.from_regex(rb"[A-Za-z0-9_=-]*(\.[A-Za-z0-9_=-]*){0,4}"))
def test_the_parser_raises_value_errors_only(text: bytes) -> None:
    try:
        parsed = parse_token(text)
    except ValueError:
        return
    assert text == parsed.signed + b"." + base64url(parsed.signature)
