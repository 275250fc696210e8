"""The certificate authority: made here, brought along, or elsewhere."""

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from helixflow.core.errors import ExitCode, UserError
from helixflow.pki.certificates import (
    KeyPair,
    build_path,
    create_root,
    is_authority,
    is_self_signed,
    parse_certificates,
    parse_key,
    to_pem,
)
from helixflow.pki.files import PkiFolder, read_public, read_secret, write_atomically


@dataclass(frozen=True, slots=True, repr=False)
class Authority:
    """Who signs here, and the roots that everybody trusts."""

    issuer: KeyPair
    roots: tuple[x509.Certificate, ...]


def load_authority(folder: PkiFolder) -> Authority | None:
    """The authority in `folder`; None when there is none to sign with. Raises `UserError` when it is damaged."""
    try:
        key_pem = read_secret(folder.ca_key)
    except FileNotFoundError:
        return None
    try:
        roots = parse_certificates(_read_roots(folder))
        issuer = _find_issuer(key_pem, roots)
        if not roots and is_self_signed(issuer.certificate):
            # Its creation was interrupted between the two files.
            roots = (issuer.certificate,)
            write_atomically(folder.ca_certificate, to_pem(roots), 0o644)
        if not build_path(issuer.chain, roots):
            raise ValueError(f"its certificate does not lead to one in {folder.ca_certificate}")
    except ValueError as exc:
        message = f"{folder.ca_key}: {exc}; restore {folder.path} from a copy"
        raise UserError(message, ExitCode.CONFIG) from exc
    return Authority(issuer, roots)


def write_authority(folder: PkiFolder, authority: Authority) -> None:
    """Replaces both files, the key first: roots without a key would look like an authority that is elsewhere."""
    write_atomically(folder.ca_key, authority.issuer.pem(), 0o600)
    write_atomically(folder.ca_certificate, to_pem(authority.roots), 0o644)


def create_authority(now: float) -> Authority:
    """A new self-signed one."""
    issuer = create_root(now)
    return Authority(issuer, (issuer.certificate,))


def read_own_authority(certificate_file: Path, key_file: Path, now: float) -> Authority:
    """An authority that the operator brings along: in `certificate_file` the signing certificate, then those above it
    up to the root. Raises `UserError` (CONFIG) that says what does not fit.
    """
    try:
        key = parse_key(read_public(key_file))
    except FileNotFoundError as exc:
        raise UserError(f"{key_file}: there is no such file", ExitCode.CONFIG) from exc
    except ValueError as exc:
        raise UserError(f"{key_file}: {exc}", ExitCode.CONFIG) from exc
    try:
        chain = parse_certificates(read_public(certificate_file))
        _check_chain(chain, now)
        if chain[0].public_key() != key.public_key():
            raise ValueError(f"the first certificate does not belong to the key in {key_file}")
    except FileNotFoundError as exc:
        raise UserError(f"{certificate_file}: there is no such file", ExitCode.CONFIG) from exc
    except ValueError as exc:
        raise UserError(f"{certificate_file}: {exc}", ExitCode.CONFIG) from exc
    roots = tuple(one for one in chain if is_self_signed(one))
    return Authority(KeyPair(key, chain), roots)


def _check_chain(chain: tuple[x509.Certificate, ...], now: float) -> None:
    """Raises `ValueError` that says what does not fit."""
    if not chain:
        raise ValueError("there is no certificate in it")
    for depth, certificate in enumerate(chain):
        if not is_authority(certificate):
            raise ValueError(f"{_subject(certificate)} is not a certificate authority that may sign certificates")
        if certificate.not_valid_after_utc.timestamp() <= now:
            raise ValueError(f"{_subject(certificate)} has expired")
        limit = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
        if limit is not None and depth > limit:
            raise ValueError(f"{_subject(certificate)} does not allow {depth} authorities below it")
    if not is_self_signed(chain[-1]):
        raise ValueError("it does not end in a self-signed root; append the certificates above")
    if not build_path(chain, chain[-1:]):
        raise ValueError("its certificates do not form a chain, each signed by the next one")


def _find_issuer(key_pem: bytes, roots: tuple[x509.Certificate, ...]) -> KeyPair:
    """Usually the certificate stands below its key; put there by hand, the key may be alone. Raises `ValueError`."""
    if parse_certificates(key_pem):
        return KeyPair.parse(key_pem)
    key = parse_key(key_pem)
    for root in roots:
        if root.public_key() == key.public_key():
            return KeyPair(key, (root,))
    raise ValueError("the key does not belong to the certificate")


def _read_roots(folder: PkiFolder) -> bytes:
    try:
        return read_public(folder.ca_certificate)
    except FileNotFoundError:
        return b""


def _subject(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string() or "the certificate"
