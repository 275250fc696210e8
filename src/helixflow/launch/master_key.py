"""Replaces the master key of a data directory from which nothing is served meanwhile."""

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from helixflow.auth.changes import ChangeFeed
from helixflow.auth.master_key import MasterKey, check_master_key, find_check, find_master_key, find_neighbour, own_file
from helixflow.auth.master_key_file import make_key_file, put_in_place, stage_key
from helixflow.auth.master_key_replacement import replace_master_key
from helixflow.auth.unit import Units
from helixflow.core.clock import SystemClock
from helixflow.core.errors import ExitCode, HelixError, UserError
from helixflow.launch.lock import lock_data_dir
from helixflow.rpc.sockets import prepare_run_dir
from helixflow.settings.tree import Settings
from helixflow.storage.engine import Database, open_database
from helixflow.storage.inspection import find_standing


@dataclass(frozen=True, slots=True)
class Replaced:
    """What was done. `counts` is empty when the database had been sealed with that key already.

    `file` is where the key was put; None when the settings name a place of the operator's, who puts it there. `kept` is
    where the one before it is now, None when there was none or the new one was in its place already.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    file: Path | None = None
    kept: Path | None = None


def replace(settings: Settings, new_file: Path, *, lost: bool) -> Replaced:
    """Makes the key in `new_file`, which is made when missing, the master key: in the database, then in the data
    directory unless the settings name another place. `lost`: without the present key, see `replace_master_key`.

    Whatever ends it halfway, doing it again with the same file completes it. Raises `UserError`: UNAVAILABLE while
    something serves from the data directory, CONFIG when the present key is not the right one, USAGE, STORAGE.
    """
    prepare_run_dir(settings.run_dir)
    lock = lock_data_dir(settings.run_dir)
    try:
        own = own_file(settings)
        new, counts = asyncio.run(_replace_in_database(settings, new_file, lost))
        if own is None or _holds(own, new):
            return Replaced(counts, own)
        try:
            return Replaced(counts, own, put_in_place(own))
        except UserError as exc:
            message = f"{exc.message}; the database is sealed with the new key already: mend that, then do this again"
            raise UserError(message, exc.exit_code) from exc
    finally:
        os.close(lock)


async def _replace_in_database(settings: Settings, new_file: Path, lost: bool) -> tuple[MasterKey, Mapping[str, int]]:
    """The new key, and how many of each were sealed with it or given up."""
    standing = await find_standing(settings)
    if standing.state not in ("current", "empty"):
        raise UserError(f"{standing.name}: not of this version; look with: helixflow db current", ExitCode.STORAGE)
    if standing.state == "empty":
        raise _nothing_sealed(standing.name)
    database = await asyncio.to_thread(open_database, settings)
    try:
        async with database.reading() as connection:
            check = await find_check(connection)
        if check is None:
            raise _nothing_sealed(standing.name)
        return await _replace(settings, database, check.data, new_file, lost)
    except HelixError as exc:
        raise UserError(f"{standing.name}: {exc.message}", ExitCode.STORAGE) from exc
    finally:
        await database.close()


async def _replace(
    settings: Settings, database: Database, mark: bytes, new_file: Path, lost: bool
) -> tuple[MasterKey, Mapping[str, int]]:
    new = await asyncio.to_thread(_find, new_file)
    if new is not None and new.opens(mark):
        # Done before, or begun and cut off before the file was in its place.
        await asyncio.to_thread(_stage, settings, new)
        return new, {}
    old: MasterKey | None = None
    if lost:
        await asyncio.to_thread(_check_lost, settings, mark)
    else:
        old = await asyncio.to_thread(find_master_key, settings)
        await check_master_key(database, old)
    if new is None:
        await asyncio.to_thread(make_key_file, new_file)
        new = MasterKey.of_file(new_file)
    await asyncio.to_thread(_stage, settings, new)
    clock = SystemClock()
    return new, await replace_master_key(Units(database, clock, ChangeFeed(database, clock)), old, new)


def _stage(settings: Settings, new: MasterKey) -> None:
    """What lies there already is not the key of the database, or is this one."""
    own = own_file(settings)
    if own is not None and not _holds(own, new):
        stage_key(own, new.key)


def _check_lost(settings: Settings, mark: bytes) -> None:
    """Raises `UserError` (USAGE) when the key of the database is at hand after all."""
    try:
        present = find_master_key(settings)
    except UserError:
        present = None  # gone, spoilt or closed to us: lost
    if present is not None and present.opens(mark):
        message = f"{present.origin}: is the master key of this database and not lost; leave out --lost"
        raise UserError(message, ExitCode.USAGE)
    own = own_file(settings)
    if own is not None and (neighbour := find_neighbour(own, mark)) is not None:
        message = f"{neighbour}: is the master key of this database and not lost; name it with --new-key-file"
        raise UserError(message, ExitCode.USAGE)


def _find(path: Path) -> MasterKey | None:
    try:
        return MasterKey.of_file(path)
    except FileNotFoundError:
        return None


def _holds(path: Path, key: MasterKey) -> bool:
    """Whether that is the key in the file, which may also be none, or no key."""
    try:
        found = _find(path)
    except UserError:
        return False
    return found is not None and found.key == key.key


def _nothing_sealed(database: str) -> UserError:
    return UserError(f"{database}: nothing is sealed yet; the first start takes the key that it finds", ExitCode.USAGE)
