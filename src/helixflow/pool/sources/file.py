"""Models that already lie on this machine: `file:/path`. They are used where they are, never copied or changed."""

from pathlib import Path

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.sources.source import Source


def locate_file(source: Source) -> Path:
    """The file's path. Raises `UserError` (MODEL) unless it is a readable regular file."""
    path = Path(source.locator)
    try:
        with path.open("rb"):
            pass
        if path.is_file():
            return path
        reason = "not a regular file"
    except OSError as exc:
        reason = exc.strerror or "cannot be opened"
    raise UserError(f"model file {path}: {reason}", ExitCode.MODEL)
