"""What a database URL means, and what is wrong with one."""

import ssl
from pathlib import Path

import pytest

from helixflow.core.errors import ExitCode, UserError
from helixflow.storage.address import Address


@pytest.mark.parametrize(
    ("url", "address", "name"),
    [
        (
            "postgresql://helix@db.example.com/platform",
            Address("db.example.com", 5432, "platform", "helix", "verify-full"),
            "postgresql://db.example.com:5432/platform",
        ),
        (
            "postgres://us%40er@127.0.0.1:6543/na%20me?sslmode=require",
            Address("127.0.0.1", 6543, "na me", "us@er", "require"),
            "postgresql://127.0.0.1:6543/na me",
        ),
        (
            "postgresql://u@[::1]:1/d",
            Address("::1", 1, "d", "u", "disable"),
            "postgresql://[::1]:1/d",
        ),
        (
            "postgresql://u@/d?host=/run/postgresql",
            Address("/run/postgresql", 5432, "d", "u", "disable"),
            "postgresql:///run/postgresql:5432/d",
        ),
        (
            "postgresql://u@localhost/d?ssl=verify-ca&sslrootcert=/ca.pem&sslcert=/c.pem&sslkey=/k.pem",
            Address("localhost", 5432, "d", "u", "verify-ca", Path("/ca.pem"), Path("/c.pem"), Path("/k.pem")),
            "postgresql://localhost:5432/d",
        ),
    ],
)
def test_parts_of_a_url(url: str, address: Address, name: str) -> None:
    assert Address.parse(url) == address
    assert address.name == name


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("postgresql://u@h:port/d", "no URL of the form"),
        ("postgresql://u@h:70000/d", "no URL of the form"),
        ("postgresql://u@[::1/d", "no URL of the form"),
        ("postgresql://h/d", "names no user"),
        ("postgresql://u@h", "names no database"),
        ("postgresql://u@h/d/e", "names no database"),
        ("postgresql://u@h/d?sslmod=require", "unknown parameter 'sslmod'"),
        ("postgresql://u@h/d?options=-csearch_path=x", "unknown parameter 'options'"),
        ("postgresql://u@h/d?sslmode=prefer", "sslmode is one of disable, require, verify-ca, verify-full"),
        ("postgresql://u@h/d?sslmode=require&sslmode=disable", "twice"),
        ("postgresql://u@h/d?sslmode=", "is empty"),
        ("postgresql://u@h/d?ssl=true&sslmode=disable", "not both"),
        ("postgresql://u@h/d?sslkey=/k.pem", "sslkey needs sslcert"),
    ],
)
def test_a_wrong_url_is_one_clear_line(url: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        Address.parse(url)
    assert caught.value.exit_code is ExitCode.CONFIG
    assert caught.value.message.startswith("database.url: ")


def test_whom_a_connection_trusts() -> None:
    assert Address.parse("postgresql://u@localhost/d").tls() is None
    strict = Address.parse("postgresql://u@h/d").tls()
    assert strict is not None
    assert (strict.verify_mode, strict.check_hostname) == (ssl.CERT_REQUIRED, True)
    blind = Address.parse("postgresql://u@h/d?sslmode=require").tls()
    assert blind is not None
    assert blind.verify_mode is ssl.CERT_NONE


@pytest.mark.parametrize("parameter", ["sslrootcert", "sslcert"])
def test_certificates_that_cannot_be_read_are_one_clear_line(tmp_path: Path, parameter: str) -> None:
    (tmp_path / "no.pem").write_text("nothing of the kind")
    for file in (tmp_path / "no.pem", tmp_path / "missing.pem"):
        with pytest.raises(UserError, match=f"database.url: {parameter}: .*{file.name}"):
            Address.parse(f"postgresql://u@h/d?{parameter}={file}").tls()
