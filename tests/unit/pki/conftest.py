"""Certificate authorities of tests: ours on a clock of their own, and an operator's."""

import datetime as dt
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from helixflow.core.clock import FakeClock
from helixflow.pki.certificates import KeyPair
from helixflow.pki.files import PkiFolder
from helixflow.pki.issuing import Issuance
from helixflow.settings.tree import Settings


class Node:
    """A data directory with its own time."""

    def __init__(self, data_dir: Path, clock: FakeClock, **sections: Any) -> None:
        self.settings = Settings.model_validate({"data_dir": data_dir, **sections})
        self.clock = clock
        self.folder = PkiFolder(self.settings.pki_dir)
        self.issuance = Issuance(self.settings, clock=clock)

    def certificate(self, service: str) -> x509.Certificate:
        return KeyPair.parse(self.folder.service_file(service).read_bytes()).certificate

    def roots(self) -> list[x509.Certificate]:
        return x509.load_pem_x509_certificates(self.folder.ca_certificate.read_bytes())


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def node(tmp_path: Path, clock: FakeClock) -> Node:
    return Node(tmp_path / "data", clock)


Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class Signer:
    """An operator's authority."""

    key: Key
    certificate: x509.Certificate

    def key_pem(self, password: bytes | None = None) -> bytes:
        encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        return self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)

    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def create_signer(
    name: str, now: float, *, by: Signer | None = None, key: Any = None, days: float = 365, ca: bool = True, **more: Any
) -> Signer:
    """An authority, a root or `by` another; `signs=False`: its key usage forbids that, `depth` limits its path."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    start = dt.datetime.fromtimestamp(now, dt.UTC) - dt.timedelta(days=1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.certificate.subject if by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + dt.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=more.get("depth")), critical=True)
    )
    if "signs" in more:
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign"), False
        )
        builder = builder.add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=more["signs"],
                encipher_only=False,
                decipher_only=False,
                **usage,
            ),
            critical=True,
        )
    return Signer(key, builder.sign(by.key if by else key, hashes.SHA256()))
