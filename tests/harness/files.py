"""What a running node has written."""

import os
from contextlib import suppress
from pathlib import Path


def read_files(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its path. What is behind a link to a folder, as the models are, is left out, and
    so is what goes away meanwhile.
    """
    found: dict[str, bytes] = {}
    for below, _, names in os.walk(folder):
        for path in (Path(below, name) for name in names):
            with suppress(FileNotFoundError):
                if path.is_file():
                    found[str(path)] = path.read_bytes()
    return found
