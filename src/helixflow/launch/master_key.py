"""Replaces the master key of a data directory from which nothing is served meanwhile."""

import asyncio
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from helixflow.auth.changes import ChangeFeed
from helixflow.auth.master_key import MasterKey, check_master_key, find_check, find_master_key, find_neighbour, own_file
from helixflow.auth.master_key_file import make_key_file, put_in_place, stage_key, staged_beside
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
    where the one before it is now, if there was one.
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
        counts = asyncio.run(_replace_in_database(settings, new_file, lost))
        own = own_file(settings)
        if own is None or _is_in_place(own, new_file):
            return Replaced(counts, own)
        return Replaced(counts, own, _put_in_place(own))
    finally:
        os.close(lock)


async def _replace_in_database(settings: Settings, new_file: Path, lost: bool) -> Mapping[str, int]:
    standing = await find_standing(settings)
    if standing.state == "empty":
        raise UserError(f"{standing.name}: nothing is sealed yet; the first start makes a key", ExitCode.USAGE)
    if standing.state != "current":
        message = f"{standing.name}: its schema is not this version's; run: helixflow db current"
        raise UserError(message, ExitCode.STORAGE)
    database = await asyncio.to_thread(open_database, settings)
    try:
        async with database.reading() as connection:
            check = await find_check(connection)
        if check is None:
            raise UserError(f"{standing.name}: nothing is sealed yet; the first start makes a key", ExitCode.USAGE)
        return await _replace_mark(settings, database, check.data, new_file, lost)
    except HelixError as exc:
        raise UserError(f"{standing.name}: {exc.message}", ExitCode.STORAGE) from exc
    finally:
        await database.close()


async def _replace_mark(
    settings: Settings, database: Database, mark: bytes, new_file: Path, lost: bool
) -> Mapping[str, int]:
    own = own_file(settings)
    old: MasterKey | None = None
    with suppress(FileNotFoundError):
        new = MasterKey.of_file(new_file)
        if new.opens(mark):
            # Done before, or begun and cut off before the file was in its place.
            await _stage(own, new)
            return {}
    if lost:
        await asyncio.to_thread(_check_lost, settings, mark)
    else:
        old = await asyncio.to_thread(find_master_key, settings)
        await check_master_key(database, old)
    with suppress(FileNotFoundError):
        new = MasterKey.of_file(new_file)
