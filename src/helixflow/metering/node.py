"""Which machine this is: journals lie on its disk, and only its shipper can bring them to the ledger."""

import os
import re
import secrets
from pathlib import Path
from typing import Final

from helixflow.core.errors import ExitCode, UserError
from helixflow.settings.tree import Settings

_NAME: Final = "node.id"
_NODE_ID: Final = re.compile(r"[0-9a-f]{16}")


def read_node_id(settings: Settings) -> str:
    """16 hexadecimal digits in `data_dir/node.id` (mode 0600), made by whichever process asks first. Blocks.

    Raises `UserError` (STORAGE) when the file cannot be made, or holds something else.
    """
    path = settings.data_dir / _NAME
    try:
        if not path.exists():
            _make(path)
        text = path.read_text("ascii", "replace").strip()
    except OSError as exc:
        raise UserError(f"{path}: {exc.strerror}", ExitCode.STORAGE) from exc
    if _NODE_ID.fullmatch(text) is None:
        raise UserError(f"{path}: is not the id of a node; remove it", ExitCode.STORAGE)
    return text


def _make(path: Path) -> None:
    """Whole and on disk before it has its name; whoever comes second leaves the first one's in place."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{_NAME}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{secrets.token_hex(8)}\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        draft.unlink()
