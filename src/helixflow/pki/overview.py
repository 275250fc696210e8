"""What there is under `data_dir/pki`, for people: looks only, and judges."""

from collections.abc import Iterator
from dataclasses import dataclass

from helixflow.core.errors import UserError
from helixflow.pki.certificates import fingerprint, parse_certificates, renewal_time
from helixflow.pki.files import PkiFolder
from helixflow.pki.identity import read_pair, read_roots
from helixflow.pki.register import Register


@dataclass(frozen=True, slots=True)
class Root:
    """An authority that is trusted; `expires_at` in seconds since the epoch."""

    name: str
    fingerprint: str
    expires_at: float


@dataclass(frozen=True, slots=True)
class ServiceCertificate:
    """The certificate of a service on this node. `state` is `valid`, `due`, `expired`, `revoked` or `unusable`; then
    `problem` says why, and there is nothing else.
    """

    service: str
    state: str
    serial: str = ""
    expires_at: float = 0.0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Overview:
    """`issues_here`: whether the authority's key is on this node."""

    roots: tuple[Root, ...]
    issues_here: bool
    certificates: tuple[ServiceCertificate, ...]


def describe(folder: PkiFolder, now: float) -> Overview:
    """Raises `UserError` when there is no authority at all, or it cannot be read."""
    roots = tuple(
        Root(one.subject.rfc4514_string(), fingerprint(one), one.not_valid_after_utc.timestamp())
        for one in parse_certificates(read_roots(folder.ca_certificate))
    )
    return Overview(roots, folder.ca_key.exists(), tuple(_certificates(folder, now)))


def _certificates(folder: PkiFolder, now: float) -> Iterator[ServiceCertificate]:
    revoked = Register(folder).revoked_serials()
    for path in sorted(folder.services.glob("*.pem")):
        try:
            certificate = read_pair(path).certificate
        except UserError as exc:
            yield ServiceCertificate(path.stem, "unusable", problem=exc.message)
            continue
        expires_at = certificate.not_valid_after_utc.timestamp()
        if certificate.serial_number in revoked:
            state = "revoked"
        elif expires_at <= now:
            state = "expired"
        else:
            state = "due" if renewal_time(certificate) <= now else "valid"
        yield ServiceCertificate(path.stem, state, f"{certificate.serial_number:x}", expires_at)
