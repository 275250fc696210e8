"""What one process is among the services, and whom it believes: follows its files while it runs."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from helixflow.core.clock import Clock, SystemClock
from helixflow.core.errors import ExitCode, UserError
from helixflow.pki.certificates import KeyPair, build_path, names_of, parse_certificates
from helixflow.pki.files import PkiFolder, Version, read_public, read_secret, version_of
from helixflow.pki.names import spiffe_id
from helixflow.pki.register import Register
from helixflow.settings.tree import Settings

# A renewed certificate and a revocation are in force this long after they were written, at most.
POLL_S: Final = 0.5

log = structlog.get_logger("helixflow.pki")


@dataclass(frozen=True, slots=True, repr=False)
class Credential:
    """Private key, certificate chain and trusted roots, all PEM; `expires_at` is in seconds since the epoch."""

    key: bytes
    chain: bytes
    roots: bytes
    expires_at: float


class ServiceIdentity:
    """A service's credential and the revoked serials, as their files are now.

    `credential` is replaced as a whole and `version` counts its replacements, so threads may read both. Without a
    running `follow` both stay as they were loaded.
    """

    def __init__(self, folder: PkiFolder, trust_domain: str, service: str, *, clock: Clock | None = None) -> None:
        """Reads the files. Raises `UserError` that names the file and says what to do."""
        self.service = service
        self.trust_domain = trust_domain
        self._folder = folder
        self._clock = clock if clock is not None else SystemClock()
        self._paths = (folder.service_file(service), folder.ca_certificate)
        self._versions = self._look()
        self.credential = self._read()
        self.version = 0
        self._revoked_version = version_of(folder.revoked)
        self.revoked = Register(folder).revoked_serials()
        # What was refused last, and why: told once, though it is tried again at every look.
        self._refused: tuple[object, str] | None = None
        self._revoked_refused: tuple[object, str] | None = None
        self._listeners: list[Callable[[], None]] = []

    @classmethod
    def open(cls, settings: Settings, service: str) -> "ServiceIdentity":
        """The identity of `service` in `settings.pki_dir`. Blocks for a millisecond; raises `UserError`."""
        return cls(PkiFolder(settings.pki_dir), settings.pki.trust_domain, service)

    async def follow(self) -> None:
        """Takes over what changes on disk, until cancelled. What cannot be used is logged and not taken over."""
        while True:
            await asyncio.sleep(POLL_S)
            revoked = self.revoked
            await asyncio.to_thread(self.refresh)
            if self.revoked != revoked:
                for listener in self._listeners:
                    listener()

    def on_revocation(self, listener: Callable[[], None]) -> None:
        """Has `listener` called on the event loop, by `follow`, whenever `revoked` has changed."""
        self._listeners.append(listener)

    def refresh(self) -> None:
        """Takes over what has changed since the last look. Blocks; raises nothing."""
        self._refresh_credential()
        self._refresh_revoked()

    def _refresh_credential(self) -> None:
        versions = self._look()
        if versions == self._versions:
            return
        try:
            credential = self._read()
        except UserError as exc:
            if self._refused != (versions, exc.message):
                self._refused = versions, exc.message
                log.error("identity.refused", peer=self.service, reason=exc.message)
            return
        self._versions, self._refused = versions, None
        self.credential = credential
        self.version += 1
        log.debug("identity.renewed", peer=self.service)

    def _refresh_revoked(self) -> None:
        version = version_of(self._folder.revoked)
        if version == self._revoked_version:
            return
        try:
            revoked = Register(self._folder).revoked_serials()
        except UserError as exc:
            # Those known so far stay revoked.
            if self._revoked_refused != (version, exc.message):
                self._revoked_refused = version, exc.message
                log.error("revocations.refused", reason=exc.message)
            return
        self._revoked_version, self._revoked_refused = version, None
        self.revoked = revoked

    def _look(self) -> tuple[Version | None, ...]:
        return tuple(version_of(path) for path in self._paths)

    def _read(self) -> Credential:
        path, roots_path = self._paths
        pair = read_pair(path)
        now = self._clock.now()
        expires_at = min(one.not_valid_after_utc.timestamp() for one in pair.chain)
        if expires_at <= now:
            raise UserError(f"{path}: the certificate has expired; run: helixflow pki rotate", ExitCode.CONFIG)
        wanted = spiffe_id(self.trust_domain, self.service)
        try:
            named = names_of(pair.certificate).uris
        except ValueError as exc:
            raise UserError(f"{path}: {exc}; replace it", ExitCode.CONFIG) from exc
        if wanted not in named:
            raise UserError(f"{path}: the certificate is not that of {wanted}; replace it", ExitCode.CONFIG)
        roots = read_roots(roots_path)
        if not build_path(pair.chain, parse_certificates(roots)):
            raise UserError(f"{path}: the certificate does not lead to one in {roots_path}", ExitCode.CONFIG)
        return Credential(pair.key_pem(), pair.chain_pem(), roots, expires_at)


def read_pair(path: Path) -> KeyPair:
    """A file of private key and chain. Raises `UserError` that says what to do."""
    try:
        return KeyPair.parse(read_secret(path))
    except FileNotFoundError as exc:
        raise UserError(f"{path}: there is no such file; run: helixflow pki init", ExitCode.CONFIG) from exc
    except ValueError as exc:
        raise UserError(f"{path}: {exc}; to have a new one: helixflow pki rotate", ExitCode.CONFIG) from exc


def read_roots(path: Path) -> bytes:
    """The trust bundle. Raises `UserError` when there is none or it cannot be read."""
    try:
        pem = read_public(path)
        if not parse_certificates(pem):
            raise ValueError("there is no certificate in it")
    except FileNotFoundError as exc:
        raise UserError(f"{path}: there is no such file; run: helixflow pki init", ExitCode.CONFIG) from exc
    except ValueError as exc:
        raise UserError(f"{path}: {exc}; restore it from a copy", ExitCode.CONFIG) from exc
    return pem
