"""TLS to PostgreSQL: whom we trust, and what the URL says about it."""

import ipaddress
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from sqlalchemy import text

from helixflow.core.errors import UserError
from helixflow.settings.tree import Settings
from helixflow.storage.engine import open_database
from helixflow.storage.upgrade import upgrade
from tests.harness.postgres import PostgresServer


def make_certificate(address: str) -> tuple[bytes, bytes]:
    """A certificate for that address that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "postgres of a test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.fixture
def url(postgres_server: PostgresServer, migrated_postgresql: str) -> Iterator[str]:
    with postgres_server.database(template=migrated_postgresql) as url:
        yield url


async def is_encrypted(settings: Settings) -> bool:
    await upgrade(settings)
    database = open_database(settings)
    try:
        row = await database.fetch_one(text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"))
        assert row is not None
        return bool(row.ssl)
    finally:
        await database.close()


@pytest.mark.parametrize(
    ("address", "parameters", "outcome"),
    [
        ("127.0.0.1", "", False),
        ("127.0.0.1", "?sslmode=disable", False),
        ("127.0.0.1", "?sslmode=require", True),
        ("127.0.0.1", "?ssl=true", True),
        ("127.0.0.1", "?sslmode=verify-full&sslrootcert={root}", True),
        ("127.0.0.1", "?sslmode=verify-full", "not trusted"),
        ("127.0.0.1", "?sslmode=require&sslrootcert={other}", "not trusted"),
        ("192.0.2.1", "?sslmode=verify-full&sslrootcert={root}", "not trusted"),
        ("192.0.2.1", "?sslmode=verify-ca&sslrootcert={root}", True),
    ],
)
async def test_the_url_says_how_the_server_must_prove_itself(
    postgres_server: PostgresServer, url: str, tmp_path: Path, address: str, parameters: str, outcome: bool | str
) -> None:
    certificate, key = make_certificate(address)
    (tmp_path / "root.pem").write_bytes(certificate)
    (tmp_path / "other.pem").write_bytes(make_certificate(address)[0])
    url += parameters.format(root=tmp_path / "root.pem", other=tmp_path / "other.pem")
    settings = Settings(data_dir=tmp_path, database=postgres_server.settings(url, tmp_path))
    with postgres_server.offering_tls(certificate, key):
        if isinstance(outcome, str):
            with pytest.raises(UserError, match=outcome) as caught:
                await upgrade(settings)
            assert "\n" not in caught.value.message
        else:
            assert await is_encrypted(settings) is outcome
