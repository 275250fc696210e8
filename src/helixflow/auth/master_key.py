"""The master key: where it is found, and that it is the one this database was sealed with."""

import asyncio
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import Any, Final, Self

from sqlalchemy import Row, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.master_key_file import (
    REMEDY,
    kept_beside,
    make_key_file,
    parse_key,
    read_key_file,
    staged_beside,
)
from helixflow.auth.sealing import Sealer
from helixflow.core.errors import ExitCode, UserError
from helixflow.settings.section import SecretRef
from helixflow.settings.tree import Settings
from helixflow.storage.engine import Database
from helixflow.storage.schema import installation

FILE_NAME: Final = "master.key"
REPLACE: Final = "helixflow auth replace-master-key"
_CHECK_NAME: Final = "master_key"
_LOST: Final = f"or if it is lost for good see: {REPLACE} --help"


@dataclass(frozen=True, slots=True)
class MasterKey:
    """The key, and where it came from: `path` is None unless that is a file."""

    key: bytes = field(repr=False)
    origin: str
    path: Path | None = None

    @classmethod
    def of_file(cls, path: Path, *, group_may_read: bool = False) -> Self:
        """Raises as `read_key_file`."""
        return cls(read_key_file(path, group_may_read=group_may_read), str(path), path)

    @property
    def mark(self) -> bytes:
        """What the database knows the key by; nobody learns the key from it."""
        return Sealer(self.key).digest("check", b"")

    def opens(self, mark: bytes) -> bool:
        """Whether a database with that mark was sealed with this key."""
        return secrets.compare_digest(self.mark, mark)


def own_file(settings: Settings) -> Path | None:
    """Where HelixFlow keeps the key itself; None when the settings name another place."""
    if settings.auth.master_key_env is not None or settings.auth.master_key_file is not None:
        return None
    return settings.data_dir / FILE_NAME


def load_master_key(settings: Settings) -> MasterKey:
    """From the file or variable that the settings name, otherwise from `data_dir/master.key`, made when missing.

    Touches the disk. Raises `UserError`: CONFIG for one that is missing, malformed or open to others, STORAGE when a
    file cannot be read or made.
    """
    own = own_file(settings)
    if own is not None:
        with suppress(FileNotFoundError):
            return MasterKey.of_file(own)
        make_key_file(own)
    return find_master_key(settings)


def find_master_key(settings: Settings) -> MasterKey:
    """As `load_master_key`, but one that is missing is never made."""
    auth = settings.auth
    if auth.master_key_env is not None:
        origin = f"environment variable {auth.master_key_env}"
        try:
            return MasterKey(parse_key(SecretRef(env=auth.master_key_env).read(), origin), origin)
        except ValueError as exc:
            raise UserError(f"auth.master_key_env: {exc}", ExitCode.CONFIG) from exc
    if auth.master_key_file is not None:
        path = auth.master_key_file.expanduser()
        try:
            # Mounted secrets of a container belong to a group.
            return MasterKey.of_file(path, group_may_read=True)
        except FileNotFoundError as exc:
            raise UserError(f"auth.master_key_file: {path}: no such file; {REMEDY}", ExitCode.CONFIG) from exc
    path = settings.data_dir / FILE_NAME
    try:
        return MasterKey.of_file(path)
    except FileNotFoundError as exc:
        raise UserError(f"{path}: no such file; restore it, {_LOST}", ExitCode.CONFIG) from exc


async def check_master_key(database: Database, master_key: MasterKey) -> None:
    """Whether it is the key that the database was sealed with; the first one to ask makes it so.

    Raises `UserError` (CONFIG) for another key, which says where the right one is as far as that can be known;
    `HelixError` when the database cannot be used.
    """
    async with database.reading() as connection:
        known = await find_check(connection)
    if known is None:
        async with database.writing() as connection:
            # Another process may have been first.
            known = await find_check(connection)
            if known is None:
                mark = master_key.mark
                await connection.execute(insert(installation).values(name=_CHECK_NAME, number=0, data=mark))
                return
    if not master_key.opens(known.data):
        raise UserError(await asyncio.to_thread(_explain, master_key, known), ExitCode.CONFIG)


async def find_check(connection: AsyncConnection) -> Row[Any] | None:
    """`data` is the mark of the key that this database is sealed with, `number` when that key took another one's place
    (seconds since the epoch, 0 for the first). None while nothing has been sealed.
    """
    return (await connection.execute(select(installation).where(installation.c.name == _CHECK_NAME))).first()


async def replace_check(connection: AsyncConnection, master_key: MasterKey, now: int) -> None:
    """From now on the database is sealed with this key. For who has sealed all of it anew in the same transaction."""
    changed = update(installation).where(installation.c.name == _CHECK_NAME)
    await connection.execute(changed.values(data=master_key.mark, number=now))


def find_neighbour(path: Path, mark: bytes) -> Path | None:
    """A key that opens the database and lies beside `path`: there are some around a replacement."""
    for neighbour in (staged_beside(path), kept_beside(path)):
        with suppress(FileNotFoundError, UserError):
            if MasterKey.of_file(neighbour).opens(mark):
                return neighbour
    return None


def _explain(master_key: MasterKey, known: Row[Any]) -> str:
    """Why it is refused, and what to do."""
    refused = f"{master_key.origin}: not the master key of this database"
    neighbour = find_neighbour(master_key.path, known.data) if master_key.path is not None else None
    if neighbour is not None:
        # Cut off between the commit and the change of files, or a database from before it.
        return f"{refused}, but {neighbour} is; put it in place with: {REPLACE} --new-key-file {quote(str(neighbour))}"
    if known.number:
        replaced_at = datetime.fromtimestamp(known.number, UTC).strftime("%Y-%m-%d %H:%M UTC")
        return f"{refused}, which was replaced on {replaced_at}; put the new one there, on every node, {_LOST}"
    return (
        f"{refused}; restore the one that it was made with (every node needs the same: copy {FILE_NAME} from the first "
        f"one), {_LOST}"
    )
