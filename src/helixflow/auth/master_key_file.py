"""A master key in a file: 64 hexadecimal digits that their owner alone may read. How one takes another's place."""

import os
import secrets
import string
from contextlib import suppress
from pathlib import Path
from typing import Final

from helixflow.auth.sealing import KEY_BYTES
from helixflow.core.errors import ExitCode, UserError
from helixflow.pki.files import read_public, read_secret, write_atomically

REMEDY: Final = "it is 64 hexadecimal digits; make one with: openssl rand -hex 32"
_HEX_DIGITS: Final = frozenset(string.hexdigits)


def staged_beside(path: Path) -> Path:
    """Where the next key waits until the database is sealed with it."""
    return path.with_name(f"{path.name}.new")


def kept_beside(path: Path) -> Path:
    """Where the key before this one is kept: backups of the database from its time need it."""
    return path.with_name(f"{path.name}.old")


def parse_key(text: str, origin: str) -> bytes:
    """Raises `UserError` (CONFIG), without the text."""
    digits = text.strip()
    if len(digits) != 2 * KEY_BYTES or not _HEX_DIGITS.issuperset(digits):
        raise UserError(f"{origin}: does not hold a master key; {REMEDY}", ExitCode.CONFIG)
    return bytes.fromhex(digits)


def read_key_file(path: Path, *, group_may_read: bool = False) -> bytes:
    """Raises `FileNotFoundError`, or `UserError`: CONFIG for one that is malformed or open to others, STORAGE."""
    return parse_key(read_secret(path, group_may_read=group_may_read).decode(errors="replace"), str(path))


def make_key_file(path: Path) -> None:
    """A new key, whole or not at all, and never in place of another file: two processes that start at once end up with
    the same. Raises `UserError` (STORAGE).
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_text(secrets.token_bytes(KEY_BYTES)))
                file.flush()
                os.fsync(file.fileno())
            # Unlike a rename, a link does not replace.
            with suppress(FileExistsError):
                os.link(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        _sync_folder(path)
    except OSError as exc:
        raise UserError(f"{path}: cannot be made: {exc.strerror}", ExitCode.STORAGE) from exc


def stage_key(path: Path, key: bytes) -> None:
    """Writes the key that is to take the place of `path`, so that no power cut takes it. Raises `UserError` (STORAGE).

    To be done before the database is sealed with it: whatever happens then, it is found beside the present one.
    """
    staged = staged_beside(path)
    write_atomically(staged, _text(key), 0o600)
    try:
        _sync_folder(staged)
    except OSError as exc:
        raise UserError(f"{staged}: cannot be written: {exc.strerror}", ExitCode.STORAGE) from exc


def put_in_place(path: Path) -> Path | None:
    """The staged key becomes `path`. Returns where the one before it is kept now, None when there was none.

    At each moment `path` is one key or the other. Raises `UserError` (STORAGE).
    """
    kept: Path | None = kept_beside(path)
    try:
        try:
            # Also what is no key: a file is never lost here.
            write_atomically(kept_beside(path), read_public(path), 0o600)
        except FileNotFoundError:
            kept = None
        staged_beside(path).replace(path)
        _sync_folder(path)
    except OSError as exc:
        raise UserError(f"{path}: cannot be replaced: {exc.strerror}", ExitCode.STORAGE) from exc
    return kept


def _text(key: bytes) -> bytes:
    return f"{key.hex()}\n".encode("ascii")


def _sync_folder(path: Path) -> None:
    """The name of a new file is on the disk, too."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
