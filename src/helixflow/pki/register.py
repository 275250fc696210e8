"""The record of what was issued, what was revoked, which authorities have retired: lines of JSON, oldest first."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, TypeVar

import msgspec

from helixflow.core.errors import ExitCode, UserError
from helixflow.pki.files import PkiFolder, read_public, write_atomically

# Nobody accepts an expired certificate, but one may want to know of it for a while.
_KEEP_S: Final = 30 * 86_400.0

Serial = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{1,40}$")]
T = TypeVar("T", bound=msgspec.Struct)


class Issued(msgspec.Struct, frozen=True):
    """One certificate that we issued; times in seconds since the epoch, `serial` in hexadecimal."""

    serial: Serial
    service: str
    not_before: float
    not_after: float
    issuer: str


class Revoked(msgspec.Struct, frozen=True):
    """One certificate that is not to be accepted. `not_after` is None when we did not issue it."""

    serial: Serial
    revoked_at: float
    not_after: float | None = None


class Retired(msgspec.Struct, frozen=True):
    """An authority (SHA-256 of its certificate) that no certificate is left of after `until`."""

    fingerprint: str
    until: float


class Register:
    """The three files. Whoever writes holds the folder's lock; reading needs none, for files are replaced whole."""

    def __init__(self, folder: PkiFolder) -> None:
        self._folder = folder

    def issued(self) -> list[Issued]:
        """Raises `UserError` (CONFIG) when the file is damaged."""
        return _read(self._folder.issued, Issued)

    def revoked(self) -> list[Revoked]:
        """Raises `UserError` (CONFIG) when the file is damaged: silence would accept what was revoked."""
        return _read(self._folder.revoked, Revoked)

    def revoked_serials(self) -> frozenset[int]:
        return frozenset(int(one.serial, 16) for one in self.revoked())

    def record(self, entries: Iterable[Issued], now: float) -> None:
        """Adds certificates, and forgets those long expired."""
        kept = [one for one in self.issued() if one.not_after > now - _KEEP_S]
        _write(self._folder.issued, [*kept, *entries])

    def revoke(self, serials: Iterable[str], now: float) -> None:
        """Revokes certificates, known or not. Those that have expired long ago are forgotten."""
        ends = {one.serial: one.not_after for one in self.issued()}
        kept = [one for one in self.revoked() if one.not_after is None or one.not_after > now - _KEEP_S]
        known = {one.serial for one in kept}
        added = [Revoked(serial, now, ends.get(serial)) for serial in dict.fromkeys(serials) if serial not in known]
        _write(self._folder.revoked, [*kept, *added])

    def retire(self, fingerprints: Iterable[str], until: float) -> None:
        """Notes that these authorities sign no more."""
        kept = _read(self._folder.retired, Retired)
        _write(self._folder.retired, [*kept, *(Retired(one, until) for one in fingerprints)])

    def retired(self, now: float) -> frozenset[str]:
        """The authorities whose last certificate has expired. Raises `UserError` (CONFIG) when the file is damaged."""
        return frozenset(one.fingerprint for one in _read(self._folder.retired, Retired) if one.until < now)


def _read(path: Path, kind: type[T]) -> list[T]:
    try:
        return msgspec.json.Decoder(kind).decode_lines(read_public(path))
    except FileNotFoundError:
        return []
    except msgspec.DecodeError as exc:
        raise UserError(f"{path}: is damaged; restore it from a copy", ExitCode.CONFIG) from exc


def _write(path: Path, entries: Iterable[msgspec.Struct]) -> None:
    write_atomically(path, msgspec.json.Encoder().encode_lines(entries), 0o600)
