"""Who is on the other side of a connection, as its verified certificate says, and whether it still may be."""

from dataclasses import dataclass

from cryptography import x509

from helixflow.pki.certificates import names_of
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.names import parse_spiffe_id


@dataclass(frozen=True, slots=True)
class Peer:
    """The other side, as its certificate says. `expires_at` is in seconds since the epoch."""

    service: str
    trust_domain: str
    serial: int
    expires_at: float


def read_peer(certificate: x509.Certificate) -> Peer:
    """Raises `ValueError` for what is not the certificate of one service."""
    uris = names_of(certificate).uris
    if len(uris) != 1:
        raise ValueError("exactly one URI makes an identity")
    trust_domain, service = parse_spiffe_id(next(iter(uris)))
    return Peer(service, trust_domain, certificate.serial_number, certificate.not_valid_after_utc.timestamp())


def objection_to(peer: Peer, identity: ServiceIdentity, now: float) -> str | None:
    """Why `identity` does not deal with `peer`, whatever it wants; None when it does."""
    if peer.trust_domain != identity.trust_domain:
        return "it is of another trust domain"
    if peer.serial in identity.revoked:
        return "its certificate is revoked"
    if peer.expires_at <= now:
        return "its certificate has expired"
    return None
