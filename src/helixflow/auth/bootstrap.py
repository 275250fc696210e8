"""The first key: given by the operator in the environment, or made once and kept in `data_dir/bootstrap.key`."""

import asyncio
import hashlib
import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

from sqlalchemy import select

from helixflow.auth.caller import Caller, CallerKind
from helixflow.auth.keys import change_key, describe, insert_key
from helixflow.auth.organisations import DEFAULT_ORGANISATION_ID
from helixflow.auth.projects import DEFAULT_PROJECT_ID
from helixflow.auth.unit import Units
from helixflow.core.errors import ExitCode, UserError
from helixflow.core.keys import generate_key, hash_key, is_well_formed
from helixflow.rpc.access import Access, Level
from helixflow.storage.schema import api_keys

NAME: Final = "bootstrap"
_VARIABLE: Final = "HELIXFLOW_BOOTSTRAP_API_KEY"
_ENVIRONMENT: Final = "environment"
_ACCESS: Final = Access(Level.SERVICE, None, writes=True, idempotent=False)


class _Dead(Exception):
    """The key was revoked by hand, or has expired: it must not come back by a restart."""


async def ensure_bootstrap_key(units: Units, path: Path, from_env: str | None, *, shared: bool = False) -> str:
    """The bootstrap key, valid when this returns; every other bootstrap key is revoked. `path` is where it is kept.

    On a database that is `shared` each node may keep one of its own: one that was generated then gives way only to the
    next one of the same node, or to one from the environment.

    The first organisation and its project must exist. Raises `UserError`: CONFIG for a malformed or revoked key from
    the environment or a spoilt file, STORAGE when the file cannot be read or written.
    """
    if from_env is not None:
        if not is_well_formed(from_env):
            message = f"{_VARIABLE}: not a HelixFlow key (wrong form or checksum); unset it to have one generated"
            raise UserError(message, ExitCode.CONFIG)
        try:
            await _install(units, from_env, _ENVIRONMENT, alone=True)
        except _Dead as exc:
            raise UserError(f"{_VARIABLE}: this key was revoked; set another one", ExitCode.CONFIG) from exc
        return from_env
    key = await asyncio.to_thread(read_or_create_key, path)
    place = _place_of(path)
    try:
        await _install(units, key, place, alone=not shared)
    except _Dead:
        key = generate_key()
        await asyncio.to_thread(_replace, path, key)
        await _install(units, key, place, alone=not shared)
    return key


def _place_of(path: Path) -> str:
    """Tells the file of one node from that of another, and says nothing about either."""
    return "node_" + hashlib.sha256(f"{socket.gethostname()}\0{path}".encode()).hexdigest()[:24]


async def _install(units: Units, key: str, place: str, *, alone: bool) -> None:
    """Makes `key` the one valid bootstrap key of all, or of `place`. Raises `_Dead`."""
    key_hash = hash_key(key)
    caller = Caller(CallerKind.SYSTEM, place, NAME, DEFAULT_ORGANISATION_ID)
    async with units.writing(caller, _ACCESS, "install_bootstrap_key") as unit:
        row = (await unit.connection.execute(select(api_keys).where(api_keys.c.hash == key_hash))).first()
        if row is not None:
            if row.revoked_at is not None and not row.superseded:
                raise _Dead
            if row.expires_at is not None and unit.now >= row.expires_at:
                raise _Dead
        other = api_keys.c.bootstrap & api_keys.c.revoked_at.is_(None) & (api_keys.c.hash != key_hash)
        if not alone:
            other &= api_keys.c.created_by == place
        for previous in (await unit.connection.execute(select(api_keys).where(other))).all():
            await change_key(unit, previous, {"revoked_at": unit.now, "superseded": True})
        if row is not None:
            await change_key(unit, row, {"bootstrap": True, "revoked_at": None, "superseded": False})
            return
        made = await insert_key(
            unit,
            key,
            name=NAME,
            organisation_id=DEFAULT_ORGANISATION_ID,
            project_id=DEFAULT_PROJECT_ID,
            bootstrap=True,
        )
        unit.record("key", made.id, after=describe(made))


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
