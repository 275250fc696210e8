"""Renewing the certificates of this node: here, or with an authority elsewhere. Whoever uses them follows the files."""

import asyncio
from typing import Final

import structlog

from helixflow.core.clock import Clock, SystemClock
from helixflow.core.errors import ExitCode, UserError
from helixflow.pki.certificates import (
    KeyPair,
    SigningKey,
    build_path,
    create_request,
    names_of,
    parse_certificates,
    renewal_time,
)
from helixflow.pki.files import PkiFolder, write_atomically
from helixflow.pki.identity import read_pair, read_roots
from helixflow.pki.issuing import Issuance
from helixflow.settings.tree import Settings

_LONGEST_PAUSE_S: Final = 60.0
_SHORTEST_PAUSE_S: Final = 0.5

log = structlog.get_logger("helixflow.pki")


class Renewal:
    """Issues what is due, until cancelled. One in a data directory, in the control process; a second does no harm."""

    def __init__(self, settings: Settings) -> None:
        self._issuance = Issuance(settings)
        life_s = settings.pki.certificate_hours * 3600
        self._pause_s = max(_SHORTEST_PAUSE_S, min(_LONGEST_PAUSE_S, life_s / 50))
        self._failure = ""

    async def run(self) -> None:
        while True:
            await asyncio.to_thread(self._renew)
            await asyncio.sleep(self._pause_s)

    def _renew(self) -> None:
        try:
            self._issuance.renew()
        except (UserError, OSError) as exc:
            # It is tried again; told once, for certificates hold a third of their life from here on.
            reason = exc.message if isinstance(exc, UserError) else f"{exc.filename}: {exc.strerror}"
            if reason != self._failure:
                log.error("renewal.failed", reason=reason)
            self._failure = reason
        else:
            self._failure = ""


class Successor:
    """The next certificate of a service of this node whose authority is elsewhere. All block and raise `UserError`."""

    def __init__(self, folder: PkiFolder, service: str, *, clock: Clock | None = None) -> None:
        self.service = service
        self._folder = folder
        self._path = folder.service_file(service)
        self._clock = clock if clock is not None else SystemClock()
        self._key: SigningKey | None = None

    @property
    def is_needed(self) -> bool:
        """Whether there is nobody here who could issue it."""
        return self._folder.ca_certificate.exists() and not self._folder.ca_key.exists()

    def wait_s(self) -> float:
        """Seconds until it is due; 0 when it is."""
        return max(0.0, renewal_time(read_pair(self._path).certificate) - self._clock.now())

    def left_s(self) -> float:
        """Seconds that the present one is still valid."""
        return read_pair(self._path).certificate.not_valid_after_utc.timestamp() - self._clock.now()

    def request(self) -> bytes:
        """A signing request for a new key, which stays here until `accept`."""
        self._key, request = create_request()
        return request

    def accept(self, chain_pem: bytes) -> None:
        """Takes over what was issued for the last request, if it says what the present one says."""
        assert self._key is not None
        present = read_pair(self._path).certificate
        try:
            pair = KeyPair(self._key, parse_certificates(chain_pem))
            if not pair.chain or pair.certificate.public_key() != self._key.public_key():
                raise ValueError("it is not for our key")
            if names_of(pair.certificate) != names_of(present):
                raise ValueError("it is for other names")
            if pair.certificate.not_valid_after_utc <= present.not_valid_after_utc:
                raise ValueError("it ends no later than the present one")
            if not build_path(pair.chain, parse_certificates(read_roots(self._folder.ca_certificate))):
                raise ValueError(f"it does not lead to one in {self._folder.ca_certificate}; copy the new ca.crt there")
        except ValueError as exc:
            raise UserError(f"the certificate that was issued cannot be used: {exc}", ExitCode.CONFIG) from exc
        with self._folder.locked():
            write_atomically(self._path, pair.pem(), 0o600)
        self._key = None
