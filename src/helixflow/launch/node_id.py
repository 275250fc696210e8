"""Which node this is: an identity that outlives its processes and its addresses."""

import re
import secrets
from typing import Final

from helixflow.core.errors import ExitCode, UserError
from helixflow.pki.files import read_public, write_atomically
from helixflow.settings.tree import Settings

_FILE_NAME: Final = "node.id"
_ID: Final = re.compile(r"[0-9a-f]{32}")


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
