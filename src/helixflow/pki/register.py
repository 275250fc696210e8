"""The record of issued certificates and of revoked ones: lines of JSON, the oldest first."""

from collections.abc import Iterable
from typing import Final

import msgspec

from helixflow.core.errors import ExitCode, UserError
from helixflow.pki.files import PkiFolder, read_public, write_atomically

# Nobody accepts an expired certificate, but one may want to know of it for a while.
_KEEP_S: Final = 30 * 86_400.0


class Issued(msgspec.Struct, frozen=True):
    """One certificate that we issued; times in seconds since the epoch, `serial` in hexadecimal."""

    serial: str
    service: str
    not_before: float
    not_after: float
    issuer: str


class Revoked(msgspec.Struct, frozen=True):
    """One certificate that is not to be accepted. `not_after` is None when we did not issue it."""

    serial: str
    revoked_at: float
    not_after: float | None = None


class Register:
    """The two files. Whoever writes holds the folder's lock; reading needs none, for files are replaced whole."""

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


def _read(path, kind):  # type: ignore[no-untyped-def]
    try:
        return msgspec.json.Decoder(kind).decode_lines(read_public(path))
    except FileNotFoundError:
        return []
    except msgspec.DecodeError as exc:
        raise UserError(f"{path}: is damaged; restore it from a copy", ExitCode.CONFIG) from exc


def _write(path, entries):  # type: ignore[no-untyped-def]
    write_atomically(path, msgspec.json.Encoder().encode_lines(entries), 0o600)
