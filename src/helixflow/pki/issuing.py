"""Issuing on this node: what is missing or due, everything anew, for another node; and taking back."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import structlog
from cryptography import x509

from helixflow.core.clock import Clock, SystemClock
from helixflow.core.errors import ExitCode, UserError
from helixflow.pki.authority import (
    Authority,
    create_authority,
    load_authority,
    read_own_authority,
    write_authority,
)
from helixflow.pki.certificates import (
    KeyPair,
    LeafKey,
    Usage,
    build_path,
    create_leaf,
    fingerprint,
    life_of,
    names_of,
    reason_to_replace,
    sign_leaf,
)
from helixflow.pki.files import PkiFolder, write_atomically
from helixflow.pki.identity import ServiceIdentity, read_pair
from helixflow.pki.names import HTTPS, SERVICES, Names, https_names, service_names
from helixflow.pki.register import Issued, Register
from helixflow.settings.tree import Settings

# What `helixflow serve` runs, and the identity that asks for health.
NODE_SERVICES: Final = ("gateway", "control", "console", "monitoring", "shipper", HTTPS)
# The longest life of a certificate for another node.
MAX_HOURS_ELSEWHERE: Final = 24 * 90
_MISSING: Final = "missing"

log = structlog.get_logger("helixflow.pki")


class Issuance:
    """The certificates of one node. Everything here blocks and takes the folder's lock; all raise `UserError`."""

    def __init__(self, settings: Settings, *, clock: Clock | None = None) -> None:
        self._settings = settings
        self._clock = clock if clock is not None else SystemClock()
        self.folder = PkiFolder(settings.pki_dir)
        self.register = Register(self.folder)

    def ensure(self, services: Iterable[str] = NODE_SERVICES) -> list[str]:
        """Makes sure that these services have usable certificates; HTTPS only if the settings name no files for it.

        Returns what was issued. With an authority elsewhere (`ca.crt` without `ca.key`) nothing is issued, and what is
        missing or expired is an error.
        """
        has_own = self._settings.gateway.certificate_file is not None
        wanted = [service for service in services if not (service == HTTPS and has_own)]
        self.folder.prepare()
        if self.is_elsewhere():
            self._check_provided(wanted)
            return []
        with self.folder.locked():
            return self._issue_due(self._authority(create=True), wanted)

    def renew(self) -> list[str]:
        """Issues again what this node has and is due. Returns which."""
        if self.is_elsewhere():
            return []
        with self.folder.locked():
            authority = self._without_retired(self._authority())
            return self._issue_due(authority, self._present())

    def init(self, certificate_file: Path | None = None, key_file: Path | None = None) -> None:
        """Creates the authority, or takes over the one in the files, and issues what this node needs."""
        self.folder.prepare()
        with self.folder.locked():
            for path in (self.folder.ca_key, self.folder.ca_certificate):
                if path.exists():
                    raise UserError(f"{path}: there is a certificate authority already; it is never overwritten")
            write_authority(self.folder, self._new_authority(certificate_file, key_file, self._clock.now()))
        self.ensure()

    def rotate(self) -> list[str]:
        """Issues everything that this node has anew, damaged files too. Returns which."""
        with self.folder.locked():
            authority = self._authority()
            services = self._present()
            for service in services:
                self._issue_here(authority, service)
        return services

    def trust_successor(
        self, certificate_file: Path | None, key_file: Path | None, *, settle: Callable[[], None]
    ) -> list[str]:
        """Changes to a new authority, made here or taken over from the files, and issues everything anew.

        It is trusted at once, and signs once `settle` has returned: until then everybody has to learn of it. The old
        one stays trusted until the last certificate from it has expired. Returns what was issued.
        """
        now = self._clock.now()
        with self.folder.locked():
            old = self._authority()
            new = self._new_authority(certificate_file, key_file, now)
            both = Authority(old.issuer, tuple(dict.fromkeys((*new.roots, *old.roots))))
            write_authority(self.folder, both)
        settle()
        with self.folder.locked():
            write_authority(self.folder, Authority(new.issuer, both.roots))
            now = self._clock.now()
            until = max((one.not_after for one in self.register.issued()), default=now)
            leaving = [fingerprint(root) for root in old.roots if root not in new.roots]
            self.register.retire(leaving, until)
            services = self._present()
            for service in services:
                self._issue_here(Authority(new.issuer, both.roots), service)
        return services

    def issue_elsewhere(self, service: str, names: Names, hours: float | None = None) -> bytes:
        """A certificate for another node: PEM of key and chain, that is kept nowhere here."""
        _check_service(service)
        if service == HTTPS and not names.dns and not names.addresses:
            raise UserError("give the names of the other node (--name)", ExitCode.USAGE)
        with self.folder.locked():
            full = names if service == HTTPS else names | self._names(service)
            return self._issue(self._authority(), service, full, hours).pem()

    def issue_successor(self, shown: x509.Certificate, service: str, key: LeafKey) -> tuple[x509.Certificate, ...]:
        """What follows a certificate of another node's `service`: the same names and life, for its new `key`."""
        now = self._clock.now()
        life_s = min(life_of(shown), MAX_HOURS_ELSEWHERE * 3600)
        with self.folder.locked():
            authority = self._authority()
            chain = sign_leaf(authority.issuer, service, key, names_of(shown), Usage.SERVICE, now=now, life_s=life_s)
            self.register.record([_entry(service, chain[0], authority)], now)
        return chain

    def issue(self, service: str) -> None:
        """A new certificate for a service of this node."""
        _check_service(service)
        with self.folder.locked():
            self._issue_here(self._authority(), service)

    def revoke(self, what: str) -> list[str]:
        """Takes back all certificates of a service, or the one with that serial, known or not; returns the serials.

        A service of this node has a new certificate before the old ones stop working.
        """
        with self.folder.locked():
            now = self._clock.now()
            revoked = self.register.revoked_serials()
            living = [
                one for one in self.register.issued() if one.not_after > now and int(one.serial, 16) not in revoked
            ]
            serial = _parse_serial(what)
            chosen = [one for one in living if what == one.service or serial == one.serial]
            if not chosen and serial is None:
                raise UserError(f"no valid certificate of {what!r} is on record; see: helixflow pki show")
            serials = [one.serial for one in chosen] or [str(serial)]
            if not self.is_elsewhere():
                self._replace_revoked(self._authority(), set(serials))
            self.register.revoke(serials, now)
        return serials

    def is_elsewhere(self) -> bool:
        """Whether certificates come from outside: there is a trust bundle, and no key to sign with."""
        return self.folder.ca_certificate.exists() and not self.folder.ca_key.exists()

    def _authority(self, *, create: bool = False) -> Authority:
        authority = load_authority(self.folder)
        now = self._clock.now()
        if authority is None and not create:
            if self.is_elsewhere():
                raise UserError(f"{self.folder.ca_key}: not here, so certificates are issued elsewhere")
            raise UserError(f"{self.folder.path}: there is no certificate authority yet; run: helixflow pki init")
        if authority is None:
            authority = create_authority(now)
            write_authority(self.folder, authority)
            log.info("authority.created", fingerprint=fingerprint(authority.issuer.certificate))
        if authority.issuer.certificate.not_valid_after_utc.timestamp() <= now:
            message = (
                f"{self.folder.ca_certificate}: the authority has expired; move {self.folder.path} away, start again"
            )
            raise UserError(message, ExitCode.CONFIG)
        return authority

    def _new_authority(self, certificate_file: Path | None, key_file: Path | None, now: float) -> Authority:
        if certificate_file is not None and key_file is not None:
            return read_own_authority(certificate_file, key_file, now)
        return create_authority(now)

    def _without_retired(self, authority: Authority) -> Authority:
        """Ends the trust in authorities of which no certificate is left."""
        gone = self.register.retired(self._clock.now())
        roots = tuple(one for one in authority.roots if fingerprint(one) not in gone)
        if roots == authority.roots or not build_path(authority.issuer.chain, roots):
            return authority
        left = Authority(authority.issuer, roots)
        write_authority(self.folder, left)
        log.info("authority.retired", trusted=len(roots))
        return left

    def _issue_due(self, authority: Authority, services: Iterable[str]) -> list[str]:
        """One file that cannot be judged does not keep the others from being renewed; then it is raised."""
        revoked = self.register.revoked_serials()
        issued: list[str] = []
        failure: UserError | None = None
        for service in services:
            try:
                reason = self._reason_to_issue(authority, service, revoked)
            except UserError as exc:
                failure = failure or exc
                continue
            if reason is not None:
                self._issue_here(authority, service)
                note = log.debug if reason == _MISSING else log.info
                note("certificate.issued", peer=service, reason=reason)
                issued.append(service)
        if failure is not None:
            raise failure
        return issued

    def _reason_to_issue(self, authority: Authority, service: str, revoked: frozenset[int]) -> str | None:
        path = self.folder.service_file(service)
        if not path.exists():
            return _MISSING
        certificate = read_pair(path).certificate
        if certificate.serial_number in revoked:
            return "revoked"
        return reason_to_replace(
            certificate,
            authority.issuer.certificate,
            self._names(service),
            now=self._clock.now(),
            life_s=self._life_s,
        )

    def _replace_revoked(self, authority: Authority, serials: set[str]) -> None:
        for service in self._present():
            certificate = read_pair(self.folder.service_file(service)).certificate
            if f"{certificate.serial_number:x}" in serials:
                self._issue_here(authority, service)

    def _issue_here(self, authority: Authority, service: str) -> None:
        pair = self._issue(authority, service, self._names(service))
        write_atomically(self.folder.service_file(service), pair.pem(), 0o600)

    def _issue(self, authority: Authority, service: str, names: Names, hours: float | None = None) -> KeyPair:
        now = self._clock.now()
        usage = Usage.HTTPS if service == HTTPS else Usage.SERVICE
        life_s = self._life_s if hours is None else hours * 3600
        pair = create_leaf(authority.issuer, service, names, usage, now=now, life_s=life_s)
        self.register.record([_entry(service, pair.certificate, authority)], now)
        return pair

    def _names(self, service: str) -> Names:
        gateway = self._settings.gateway
        if service == HTTPS:
            return https_names(gateway.tls_names, gateway.https_host)
        return service_names(self._settings.pki.trust_domain, service)

    @property
    def _life_s(self) -> float:
        return self._settings.pki.certificate_hours * 3600

    def _present(self) -> list[str]:
        known = {*SERVICES, HTTPS}
        return sorted(path.stem for path in self.folder.services.glob("*.pem") if path.stem in known)

    def _check_provided(self, services: Iterable[str]) -> None:
        for service in services:
            path = self.folder.service_file(service)
            if not path.exists():
                names = " --name HOST" if service == HTTPS else ""
                message = (
                    f"{path}: there is no such file, and certificates are issued elsewhere; on the node that has the "
                    f"authority (that of the auth service) run: helixflow pki issue {service}{names} --out "
                    f"{service}.pem; copy that here as {path} (mode 600)"
                )
                raise UserError(message, ExitCode.CONFIG)
            if service != HTTPS:
                ServiceIdentity(self.folder, self._settings.pki.trust_domain, service, clock=self._clock)
            elif read_pair(path).certificate.not_valid_after_utc.timestamp() <= self._clock.now():
                raise UserError(f"{path}: the certificate has expired; replace it", ExitCode.CONFIG)


def ensure_pki(settings: Settings, services: Iterable[str] = NODE_SERVICES, *, clock: Clock | None = None) -> list[str]:
    """Makes sure that the services of this node can start: authority, certificates. Returns what was issued.

    Never overwrites an authority; several processes may do it at once. Blocks: a few milliseconds when nothing is to be
    done. Raises `UserError` that names the file and says what to do.
    """
    return Issuance(settings, clock=clock).ensure(services)


def _entry(service: str, certificate: x509.Certificate, authority: Authority) -> Issued:
    return Issued(
        serial=f"{certificate.serial_number:x}",
        service=service,
        not_before=certificate.not_valid_before_utc.timestamp(),
        not_after=certificate.not_valid_after_utc.timestamp(),
        issuer=fingerprint(authority.issuer.certificate),
    )


def _check_service(service: str) -> None:
    known = (*SERVICES, HTTPS)
    if service not in known:
        raise UserError(f"{service!r} is no service; there are {', '.join(known)}", ExitCode.USAGE)


def _parse_serial(text: str) -> str | None:
    """A serial as openssl or browsers show it, in our form; None when it is none."""
    digits = text.replace(":", "").lower().lstrip("0")
    if 16 <= len(digits) <= 40 and all(digit in "0123456789abcdef" for digit in digits):
        return digits
    return None
