"""The master key: where it is found, how it is made, and that it is the one this database was sealed with."""

import os
import secrets
import string
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sqlalchemy import insert, select

from helixflow.auth.sealing import KEY_BYTES, Sealer
from helixflow.core.errors import ExitCode, UserError
from helixflow.pki.files import read_secret
from helixflow.settings.tree import SecretRef, Settings
from helixflow.storage.engine import Database
from helixflow.storage.schema import installation

FILE_NAME: Final = "master.key"
_CHECK_NAME: Final = "master_key"
_HEX_DIGITS: Final = frozenset(string.hexdigits)
_REMEDY: Final = "it is 64 hexadecimal digits; make one with: openssl rand -hex 32"


@dataclass(frozen=True, slots=True)
class MasterKey:
    """The key, and where it came from."""

    key: bytes = field(repr=False)
    origin: str


def load_master_key(settings: Settings) -> MasterKey:
    """From the file or variable that the settings name, otherwise from `data_dir/master.key`, made when missing.

    Touches the disk. Raises `UserError`: CONFIG for one that is missing, malformed or open to others, STORAGE when a
    file cannot be read or made.
    """
    auth = settings.auth
    if auth.master_key_env is not None:
        origin = f"environment variable {auth.master_key_env}"
        try:
            return MasterKey(_parse(SecretRef(env=auth.master_key_env).read(), origin), origin)
        except ValueError as exc:
            raise UserError(f"auth.master_key_env: {exc}", ExitCode.CONFIG) from exc
    if auth.master_key_file is not None:
        path = auth.master_key_file.expanduser()
        try:
            # Mounted secrets of a container belong to a group.
            return _read(path, group_may_read=True)
        except FileNotFoundError as exc:
            raise UserError(f"auth.master_key_file: {path}: no such file; {_REMEDY}", ExitCode.CONFIG) from exc
    path = settings.data_dir / FILE_NAME
    with suppress(FileNotFoundError):
        return _read(path)
    _make(path)
    return _read(path)


async def check_master_key(database: Database, master_key: MasterKey) -> None:
    """Whether it is the key that the database was sealed with; the first one to ask makes it so.

    Raises `UserError` (CONFIG) for another key, `HelixError` when the database cannot be used.
    """
    mark = Sealer(master_key.key).digest("check", b"")
    query = select(installation.c.data).where(installation.c.name == _CHECK_NAME)
    async with database.reading() as connection:
        known = (await connection.execute(query)).scalar()
    if known is None:
        async with database.writing() as connection:
            # Another process may have been first.
            known = (await connection.execute(query)).scalar()
            if known is None:
                known = mark
                await connection.execute(insert(installation).values(name=_CHECK_NAME, number=0, data=mark))
    if not secrets.compare_digest(known, mark):
        raise UserError(
            f"{master_key.origin}: not the master key of this database; restore the one that it was made with "
            f"(every node needs the same: copy {FILE_NAME} from the first one)",
            ExitCode.CONFIG,
        )


def _read(path: Path, *, group_may_read: bool = False) -> MasterKey:
    text = read_secret(path, group_may_read=group_may_read).decode(errors="replace")
    return MasterKey(_parse(text, str(path)), str(path))


def _parse(text: str, origin: str) -> bytes:
    digits = text.strip()
    if len(digits) != 2 * KEY_BYTES or not _HEX_DIGITS.issuperset(digits):
        raise UserError(f"{origin}: does not hold a master key; {_REMEDY}", ExitCode.CONFIG)
    return bytes.fromhex(digits)


def _make(path: Path) -> None:
    """Whole or not at all, and never in place of another: two processes that start at once end up with the same."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_bytes(KEY_BYTES).hex() + "\n")
                file.flush()
                os.fsync(file.fileno())
            # Unlike a rename, a link does not replace.
            with suppress(FileExistsError):
                os.link(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as exc:
        raise UserError(f"{path}: cannot be made: {exc.strerror}", ExitCode.STORAGE) from exc
