"""TLS of the HTTPS listener, and between gateways and replicas: 1.3 only, with certificates that change meanwhile."""

import asyncio
import secrets
import ssl
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from cryptography.hazmat.primitives import serialization

from helixflow.core.clock import Clock, SystemClock
from helixflow.core.errors import ExitCode, UserError
from helixflow.pki.certificates import KeyPair
from helixflow.pki.files import PkiFolder, Version, read_public, read_secret, version_of
from helixflow.pki.identity import Credential, ServiceIdentity
from helixflow.pki.names import HTTPS
from helixflow.settings.tree import Settings

# How often `follow` looks at the files.
POLL_S: Final = 1.0

log = structlog.get_logger("helixflow.pki")


@dataclass(frozen=True, slots=True, repr=False)
class _Sealed:
    """Key and chain as PEM; the key encrypted, for OpenSSL reads them from a file only."""

    pem: bytes
    password: str


class ServerContext:
    """The `ssl.SSLContext` of a listener whose certificate lies in files that somebody replaces from time to time."""

    def __init__(self, certificate_file: Path, key_file: Path | None = None, *, clock: Clock | None = None) -> None:
        """Reads the files; without `key_file` the key is in `certificate_file`. Blocks for some milliseconds.

        Raises `UserError` that names the file and says what to do.
        """
        self._certificate_file = certificate_file.expanduser()
        self._key_file = key_file.expanduser() if key_file is not None else self._certificate_file
        self._clock = clock if clock is not None else SystemClock()
        self._versions = self._look()
        # What was refused last, and why: told once, though it is tried again at every look.
        self._refused: tuple[object, str] | None = None
        self.context = _create_context()
        _load(self.context, self._read())

    @classmethod
    def open(cls, settings: Settings) -> "ServerContext":
        """Of the operator's files if the settings name them, else of our own certificate. Raises `UserError`."""
        gateway = settings.gateway
        if gateway.certificate_file is not None:
            return cls(gateway.certificate_file, gateway.key_file)
        return cls(PkiFolder(settings.pki_dir).service_file(HTTPS))

    async def reload_if_changed(self) -> bool:
        """Takes over changed files for connections from now on; True when it did.

        What cannot be used (half-written, of two pairs, expired, or no room for a copy) is logged once, and tried again
        at the next look: the present pair stays.
        """
        versions = await asyncio.to_thread(self._look)
        if versions == self._versions:
            return False
        try:
            sealed = await asyncio.to_thread(self._read)
            # Not in a thread: a handshake on the event loop must not see the certificate without its key.
            _load(self.context, sealed)
        except UserError as exc:
            if self._refused != (versions, exc.message):
                self._refused = versions, exc.message
                log.error("https_certificate.refused", reason=exc.message)
            return False
        self._versions, self._refused = versions, None
        log.info("https_certificate.renewed")
        return True

    async def follow(self) -> None:
        """Looks every `POLL_S` seconds, until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            await self.reload_if_changed()

    def _look(self) -> tuple[Version | None, ...]:
        return version_of(self._certificate_file), version_of(self._key_file)

    def _read(self) -> _Sealed:
        """Reads and tries the files. Raises `UserError`."""
        try:
            # ACME clients give their key to a group of servers.
            key_pem = read_secret(self._key_file, group_may_read=True)
            pair = KeyPair.parse(key_pem, read_public(self._certificate_file))
            if pair.certificate.not_valid_after_utc.timestamp() <= self._clock.now():
                raise ValueError("the certificate has expired")
            sealed = _seal(pair)
            _load(_create_context(), sealed)
        except FileNotFoundError as exc:
            raise UserError(f"{exc.filename}: there is no such file", ExitCode.CONFIG) from exc
        except ValueError as exc:
            raise UserError(f"{self._certificate_file}: {exc}; replace it", ExitCode.CONFIG) from exc
        return sealed


class PeerContext:
    """The `ssl.SSLContext` of one of our services towards another: mutual, with the newest certificate of `identity`.

    `context` is replaced as a whole: ask for it with each connection. As a client it checks the name of the server.
    """

    def __init__(
        self,
        identity: ServiceIdentity,
        *,
        server_side: bool,
        adapt: Callable[[ssl.SSLContext], None] | None = None,
    ) -> None:
        """`adapt` is given each context before it is used. Blocks for some milliseconds.

        Raises `UserError` (STORAGE) without room for a temporary file.
        """
        self._identity = identity
        self._server_side = server_side
        self._adapt = adapt
        self._version = identity.version
        self.context = self._build(identity.credential)

    async def follow(self) -> None:
        """Takes over what the identity's own `follow` has found, until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            version = self._identity.version
            if version == self._version:
                continue
            try:
                self.context = await asyncio.to_thread(self._build, self._identity.credential)
            except UserError as exc:
                # The present one stays good for a third of its life; it is tried again.
                log.error("peer_context.refused", peer=self._identity.service, reason=exc.message)
                continue
            self._version = version

    def _build(self, credential: Credential) -> ssl.SSLContext:
        kind = ssl.PROTOCOL_TLS_SERVER if self._server_side else ssl.PROTOCOL_TLS_CLIENT
        context = ssl.SSLContext(kind)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=credential.roots.decode())
        _load(context, _seal(KeyPair.parse(credential.key, credential.chain)))
        if self._server_side:
            # Nobody resumes a session here, whose certificate could have been revoked meanwhile.
            context.num_tickets = 0
        if self._adapt is not None:
            self._adapt(context)
        return context


def _create_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    return context


def _seal(pair: KeyPair) -> _Sealed:
    password = secrets.token_hex(32)
    key = pair.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password.encode()),
    )
    return _Sealed(key + pair.chain_pem(), password)


def _load(context: ssl.SSLContext, sealed: _Sealed) -> None:
    """OpenSSL wants a file; a copy of ours, for the original may change between two looks.

    Raises `ValueError` for what TLS cannot use, or `UserError` (STORAGE) when there is no room for the copy: `context`
    is then as it was.
    """
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(sealed.pem)
            file.flush()
            context.load_cert_chain(file.name, password=sealed.password)
    except ssl.SSLError as exc:
        raise ValueError("not usable for TLS") from exc
    except OSError as exc:
        message = f"the folder for temporary files (TMPDIR) cannot be used: {exc.strerror}; make room there"
        raise UserError(message, ExitCode.STORAGE) from exc
