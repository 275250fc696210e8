"""The first key: given by the operator in the environment, or made once and kept in `data_dir/bootstrap.key`."""

import asyncio
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Final

from sqlalchemy import select, update

from helixflow.auth.keys import KeyDirectory
from helixflow.core.clock import Clock
from helixflow.core.errors import ExitCode, UserError
from helixflow.core.keys import generate_key, hash_key, is_well_formed
from helixflow.storage.engine import Database
from helixflow.storage.schema import api_keys

FILE_NAME: Final = "bootstrap.key"
NAME: Final = "bootstrap"
_VARIABLE: Final = "HELIXFLOW_BOOTSTRAP_API_KEY"


class _Dead(Exception):
    """The key was revoked by hand, or has expired: it must not come back by a restart."""


async def ensure_bootstrap_key(
    directory: KeyDirectory, database: Database, clock: Clock, data_dir: Path, from_env: str | None
) -> str:
    """The bootstrap key, valid in the directory when this returns; every other bootstrap key is revoked.

    Raises `UserError`: CONFIG for a malformed or revoked key from the environment or a spoilt file, STORAGE when the
    file cannot be read or written.
    """
    if from_env is not None:
        if not is_well_formed(from_env):
            message = f"{_VARIABLE}: not a HelixFlow key (wrong form or checksum); unset it to have one generated"
            raise UserError(message, ExitCode.CONFIG)
        try:
            await _install(directory, database, clock, from_env)
        except _Dead as exc:
            raise UserError(f"{_VARIABLE}: this key was revoked; set another one", ExitCode.CONFIG) from exc
        return from_env
    path = data_dir / FILE_NAME
    key = await asyncio.to_thread(read_or_create_key, path)
    try:
        await _install(directory, database, clock, key)
    except _Dead:
        key = generate_key()
        await asyncio.to_thread(_replace, path, key)
        await _install(directory, database, clock, key)
    return key


async def _install(directory: KeyDirectory, database: Database, clock: Clock, key: str) -> None:
    """Makes `key` the one valid bootstrap key. Raises `_Dead`."""
    key_hash = hash_key(key)
    async with database.writing() as connection:
        row = (await connection.execute(select(api_keys).where(api_keys.c.hash == key_hash))).first()
        if row is not None:
            if row.revoked_at is not None and not row.superseded:
                raise _Dead
            if row.expires_at is not None and clock.now() >= row.expires_at:
                raise _Dead
        other = api_keys.c.bootstrap & api_keys.c.revoked_at.is_(None) & (api_keys.c.hash != key_hash)
        for previous in (await connection.execute(select(api_keys).where(other))).all():
            await directory.revoke_row(connection, previous, superseded=True)
        if row is None:
            await directory.insert_key(connection, key, NAME, expires_at=0, bootstrap=True)
        else:
            revived = {"bootstrap": True, "revoked_at": None, "superseded": False}
            await connection.execute(update(api_keys).where(api_keys.c.id == row.id).values(revived))


def read_or_create_key(path: Path) -> str:
    """The key in the file, which is written with a fresh one (mode 0600, whole or not at all) when missing.

    Two processes that start at once end up with the same key. Raises `UserError`.
    """
    try:
        with suppress(FileNotFoundError):
            return _read(path)
        draft = _write_draft(path, generate_key())
        try:
            # Unlike a rename, a link never replaces what another process put there meanwhile.
            with suppress(FileExistsError):
                os.link(draft, path)
        finally:
            draft.unlink()
        return _read(path)
    except OSError as exc:
        raise UserError(f"{path}: cannot be read or written: {exc.strerror}", ExitCode.STORAGE) from exc


def _read(path: Path) -> str:
    key = path.read_text(encoding="utf-8", errors="replace").strip()
    if not is_well_formed(key):
        message = f"{path}: does not hold a HelixFlow key; restore it, or delete it to have one generated"
        raise UserError(message, ExitCode.CONFIG)
    path.chmod(0o600)
    return key


def _replace(path: Path, key: str) -> None:
    try:
        _write_draft(path, key).replace(path)
    except OSError as exc:
        raise UserError(f"{path}: cannot be written: {exc.strerror}", ExitCode.STORAGE) from exc


def _write_draft(path: Path, key: str) -> Path:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(key + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        draft.unlink()
        raise
    return draft
