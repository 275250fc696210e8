"""X.509: building certificates, and reading what others built."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from itertools import pairwise
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from helixflow.pki.names import Address, Names

# Clocks of nodes differ: a new certificate is valid from a little earlier on.
BACKDATE_S: Final = 300.0
_ORGANISATION: Final = "HelixFlow"
_AUTHORITY_S: Final = 10 * 365 * 86_400.0

# What gRPC's TLS (BoringSSL) and browsers verify; no Ed25519 and no P-521.
SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
LeafKey = ec.EllipticCurvePublicKey


class Usage(Enum):
    """What a certificate may be used for in TLS."""

    SERVICE = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
    HTTPS = (ExtendedKeyUsageOID.SERVER_AUTH,)


@dataclass(frozen=True, slots=True, repr=False)
class KeyPair:
    """A private key with its certificate and the certificates above it, leaf first, without a root."""

    key: SigningKey
    chain: tuple[x509.Certificate, ...]

    @property
    def certificate(self) -> x509.Certificate:
        return self.chain[0]

    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def chain_pem(self) -> bytes:
        return to_pem(self.chain)

    def pem(self) -> bytes:
        return self.key_pem() + self.chain_pem()

    @classmethod
    def parse(cls, key_pem: bytes, chain_pem: bytes | None = None) -> "KeyPair":
        """Reads a private key and its chain, from one file or from two.

        Raises `ValueError` that says what is wrong, without any of it.
        """
        key = parse_key(key_pem)
        chain = parse_certificates(chain_pem if chain_pem is not None else key_pem)
        if not chain:
            raise ValueError("there is no certificate in it")
        try:
            belongs = chain[0].public_key() == key.public_key()
        except UnsupportedAlgorithm as exc:
            raise ValueError("the certificate's key is of a kind that is not supported") from exc
        if not belongs:
            raise ValueError("the key and the certificate do not belong together")
        return cls(key, chain)


def parse_key(pem: bytes) -> SigningKey:
    """The private key in `pem`. Raises `ValueError` that says what is wrong, without any of it."""
    try:
        key = serialization.load_pem_private_key(_key_block(pem), password=None)
    except TypeError as exc:
        raise ValueError("the private key is encrypted; decrypt it first (openssl pkey)") from exc
    except Exception as exc:
        raise ValueError("there is no readable private key in it") from exc
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
        return key
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
        return key
    raise ValueError(
        "the key is of a kind that is not supported; use ECDSA P-256 or P-384, or RSA of 2048 bits or more"
    )


def parse_certificates(pem: bytes) -> tuple[x509.Certificate, ...]:
    """All certificates in `pem`, perhaps none. Raises `ValueError`."""
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        return ()
    try:
        return tuple(x509.load_pem_x509_certificates(pem))
    except ValueError as exc:
        raise ValueError("a certificate in it is damaged") from exc


def to_pem(certificates: Iterable[x509.Certificate]) -> bytes:
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)


def create_root(now: float) -> KeyPair:
    """A self-signed authority of ten years, with a key of its own. It signs leaves only."""
    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    # The name differs from every other of ours, else trust stores mix up an old one and its successor.
    name = _name(f"HelixFlow CA {serial:x}"[:24])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(_moment(now - BACKDATE_S))
        .not_valid_after(_moment(now + _AUTHORITY_S))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return KeyPair(key, (certificate,))


def create_leaf(issuer: KeyPair, subject: str, names: Names, usage: Usage, *, now: float, life_s: float) -> KeyPair:
    """A new key with a certificate for `names`, valid for `life_s` from `now` on, or until its issuer's end.

    Raises `ValueError` when the issuer has expired.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    return KeyPair(key, sign_leaf(issuer, subject, key.public_key(), names, usage, now=now, life_s=life_s))


def sign_leaf(
    issuer: KeyPair, subject: str, key: LeafKey, names: Names, usage: Usage, *, now: float, life_s: float
) -> tuple[x509.Certificate, ...]:
    """As `create_leaf`, for a key that somebody else has: the certificate and those above it, without a root."""
    end = min(now + life_s, issuer.certificate.not_valid_after_utc.timestamp())
    if end <= now:
        raise ValueError("the certificate authority has expired")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer.certificate.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # For very short lives less, so that two thirds of it are still about two thirds.
        .not_valid_before(_moment(now - min(BACKDATE_S, life_s / 20)))
        .not_valid_after(_moment(end))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usage.value), critical=False)
        .add_extension(_alternative_names(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(_authority_key(issuer.certificate), critical=False)
        .sign(issuer.key, _hash_for(issuer.key))
    )
    above = tuple(one for one in issuer.chain if not is_self_signed(one))
    return certificate, *above


def create_request() -> tuple[SigningKey, bytes]:
    """A new key, and a signing request for it (PKCS #10, DER) that names nobody."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return key, request.public_bytes(serialization.Encoding.DER)


def read_request(der: bytes) -> LeafKey:
    """The key of a signing request whose sender has it. Raises `ValueError`."""
    try:
        request = x509.load_der_x509_csr(der)
        key = request.public_key()
        is_signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise ValueError("that is no signing request") from exc
    if not is_signed:
        raise ValueError("the signing request is not signed with its own key")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
        raise ValueError("the key is of a kind that is not supported; use ECDSA P-256 or P-384")
    return key


def names_of(certificate: x509.Certificate) -> Names:
    """The subject's alternative names that we know of. Raises `ValueError` when they cannot be read."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return Names()
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as exc:
        raise ValueError("the certificate's extensions cannot be read") from exc
    return Names(
        uris=frozenset(names.get_values_for_type(x509.UniformResourceIdentifier)),
        dns=frozenset(names.get_values_for_type(x509.DNSName)),
        # Networks stand in name constraints only.
        addresses=frozenset(one for one in names.get_values_for_type(x509.IPAddress) if isinstance(one, Address)),
    )


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether it may sign certificates."""
    try:
        if not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            return False
    except x509.ExtensionNotFound:
        return False
    try:
        return certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        return True


def is_self_signed(certificate: x509.Certificate) -> bool:
    return is_issued_by(certificate, certificate)


def is_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether `issuer` signed it; says nothing of whether it may have."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256, as browsers and openssl show it."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def renewal_time(certificate: x509.Certificate) -> float:
    """Two thirds through its life, seconds since the epoch."""
    return certificate.not_valid_before_utc.timestamp() + life_of(certificate) * 2 / 3


def life_of(certificate: x509.Certificate) -> float:
    """Seconds."""
    return (certificate.not_valid_after_utc - certificate.not_valid_before_utc).total_seconds()


def reason_to_replace(
    certificate: x509.Certificate, issuer: x509.Certificate, names: Names, *, now: float, life_s: float
) -> str | None:
    """Why a certificate is to be issued anew by `issuer`, with `names` and a life of `life_s`; None when it is good."""
    if not is_issued_by(certificate, issuer):
        return "by another authority"
    if names_of(certificate) != names:
        return "for other names"
    if not certificate.not_valid_before_utc.timestamp() <= now < renewal_time(certificate):
        return "two thirds of its life are over"
    if certificate.not_valid_after_utc.timestamp() > now + life_s + BACKDATE_S:
        return "longer-lived than the settings say"
    return None


def build_path(chain: Sequence[x509.Certificate], roots: Iterable[x509.Certificate]) -> bool:
    """Whether `chain`, leaf first, leads to one of `roots`, signature by signature."""
    if not all(is_issued_by(certificate, issuer) for certificate, issuer in pairwise(chain)):
        return False
    return any(chain[-1] == root or is_issued_by(chain[-1], root) for root in roots)


def _moment(epoch_s: float) -> datetime:
    return datetime.fromtimestamp(int(epoch_s), UTC)


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANISATION),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(names: Names) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName(
        [
            *(x509.UniformResourceIdentifier(uri) for uri in sorted(names.uris)),
            *(x509.DNSName(name) for name in sorted(names.dns)),
            *(x509.IPAddress(address) for address in sorted(names.addresses, key=str)),
        ]
    )


def _authority_key(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        known = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        public_key = issuer.public_key()
        assert isinstance(public_key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey)
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(public_key)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(known)


def _hash_for(key: SigningKey) -> hashes.SHA256 | hashes.SHA384:
    large = isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP384R1)
    return hashes.SHA384() if large else hashes.SHA256()


def _key_block(pem: bytes) -> bytes:
    """The part of a file that holds the private key."""
    start = pem.find(b"-----BEGIN")
    while start >= 0:
        label = pem[start : pem.find(b"\n", start)]
        end = pem.find(b"-----END", start)
        if b"PRIVATE KEY" in label and end >= 0:
            stop = pem.find(b"\n", end)
            return pem[start : stop + 1 if stop >= 0 else len(pem)]
        start = pem.find(b"-----BEGIN", start + 1)
    return b""
