"""Which node this is: an identity that outlives its processes and its addresses."""

import re
import secrets
import socket
from typing import Final

from helixflow.core.errors import ExitCode, UserError
from helixflow.pki.files import read_public, write_atomically
from helixflow.settings.tree import Settings

_FILE_NAME: Final = "node.id"
_ID: Final = re.compile(r"[0-9a-f]{32}")
_UNNAMEABLE: Final = re.compile(r"[^a-z0-9._-]+")
_FALLBACK_NAME: Final = "node"


def read_node_id(settings: Settings) -> str:
    """The identity of this data directory, made at the first call. Blocks. Raises `UserError` (STORAGE, CONFIG)."""
    path = settings.data_dir / _FILE_NAME
    try:
        found = read_public(path).decode(errors="replace").strip()
    except FileNotFoundError:
        found = secrets.token_hex(16)
        write_atomically(path, found.encode(), 0o644)
    if _ID.fullmatch(found) is None:
        raise UserError(f"{path}: is not the identity of a node; remove it", ExitCode.CONFIG)
    return found


def with_pool_name(settings: Settings) -> Settings:
    """The same settings with the name of this node's pool: without one in them, the host's."""
    if settings.pool.name is not None:
        return settings
    name = _UNNAMEABLE.sub("-", socket.gethostname().lower())[:63].strip("-._") or _FALLBACK_NAME
    return settings.model_copy(update={"pool": settings.pool.model_copy(update={"name": name})})
