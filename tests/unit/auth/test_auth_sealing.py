import pytest

from helixflow.auth.sealing import KEY_BYTES, Sealer
from helixflow.core.errors import ErrorKind, HelixError

KEY = bytes(range(KEY_BYTES))


def test_what_was_sealed_opens_again() -> None:
    sealed = Sealer(KEY).seal("totp", b"secret", "user_1")
    assert Sealer(KEY).open("totp", sealed, "user_1") == b"secret"
    assert b"secret" not in sealed and len(sealed) == len(b"secret") + 29


def test_the_same_is_sealed_differently_each_time() -> None:
    sealer = Sealer(KEY)
    assert sealer.seal("totp", b"secret") != sealer.seal("totp", b"secret")


def test_it_opens_with_the_same_key_purpose_and_context_only() -> None:
    sealed = Sealer(KEY).seal("totp", b"secret", "user_1")
    others = [
        (Sealer(bytes(KEY_BYTES)), "totp", "user_1"),
        (Sealer(KEY), "signing_key", "user_1"),
        (Sealer(KEY), "totp", "user_2"),
        (Sealer(KEY), "totp\0user_1", ""),
    ]
    for sealer, purpose, context in others:
        with pytest.raises(HelixError) as caught:
            sealer.open(purpose, sealed, context)
        assert caught.value.kind is ErrorKind.INTERNAL


def test_a_change_of_any_byte_is_noticed() -> None:
    sealer = Sealer(KEY)
    sealed = sealer.seal("totp", b"secret")
    spoilt = [sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :] for at in range(len(sealed))]
    for broken in (*spoilt, b"", sealed[:10], sealed[:-1], sealed + b"\0"):
        with pytest.raises(HelixError):
            sealer.open("totp", broken)


def test_digests_depend_on_key_and_purpose() -> None:
    digest = Sealer(KEY).digest("email", b"ada@example.com")
    assert digest == Sealer(KEY).digest("email", b"ada@example.com") and len(digest) == 32
    assert digest != Sealer(KEY).digest("address", b"ada@example.com")
    assert digest != Sealer(bytes(KEY_BYTES)).digest("email", b"ada@example.com")


def test_a_short_master_key_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Sealer(b"short")
